"""The recipes run from end to end on tiny files in the published formats, resume to the bit, and
share work."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from program_support import PYTHON, printed
from trainer_support import llama, words

pytest.importorskip("transformers")
pytest.importorskip("peft")
import recipe_cifar100
import recipe_gsm8k
import transformers

EXAMPLES = Path(recipe_gsm8k.__file__).parent
QUICK = "--device cpu --log-every 1"


pytestmark = pytest.mark.usefixtures("one_thread")


# ---- CIFAR-100: records of 3074 bytes ------------------------------------------------------------


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("cifar"), np.random.default_rng(0)
    for name, count in (("train.bin", 12), ("test.bin", 6)):
        records = rng.integers(0, 256, (count, 3074), dtype=np.uint8)
        records[:, 0] %= 20
        records[:, 1] %= 100
        records.tofile(folder / name)
    return folder


def cifar_flags(cifar, out, batch=4):
    small = f"--blocks 1 --image-size 32 --patch-size 16 --batch {batch} --precision fp32"
    return ["--data", str(cifar), "--out", str(out), *f"{small} {QUICK} --epochs 2".split()]


def cifar_run(cifar, out, *more):
    recipe_cifar100.main([*cifar_flags(cifar, out), "--lr", "1e-3", *more])
    return torch.load(out / "last.pt", weights_only=True)


def test_cifar_files_are_read_as_published(cifar):
    raw = (cifar / "train.bin").read_bytes()
    images, labels = recipe_cifar100.load(cifar / "train.bin")
    assert images.shape == (12, 3, 32, 32)
    record = raw[3 * 3074 : 4 * 3074]
    assert labels[3] == record[1]  # the fine label is the second byte
    assert images[3, 0, 0, 1] == record[2 + 1]  # red, row 0, column 1
    assert images[3, 2, 31, 31] == record[-1]  # blue ends the record


@pytest.mark.parametrize("content", [b"", bytes(3073), bytes([0, 100]) + bytes(3072)])
def test_cifar_refuses_other_files(tmp_path, content):
    (tmp_path / "train.bin").write_bytes(content)
    with pytest.raises(ValueError, match="--data"):
        recipe_cifar100.load(tmp_path / "train.bin")
    with pytest.raises(FileNotFoundError, match=r"test\.bin"):
        recipe_cifar100.load(tmp_path / "test.bin")


def test_augmentation_moves_and_flips_whole_images():
    torch.manual_seed(0)
    rows = torch.arange(32.0)[:, None].expand(32, 32)
    pixels = torch.stack([rows, rows.T, rows + 100])[None].expand(40, -1, -1, -1).contiguous()
    out = recipe_cifar100.augmented(pixels)
    assert out.shape == pixels.shape
    # a row of the image stays a row, in every channel alike
    assert out[:, 0].eq(out[:, 0, :, :1]).all()
    assert out[:, 2].eq(out[:, 0] + 100).all()
    slopes = (out[:, 1, 0, 16] - out[:, 1, 0, 15]).sign()
    assert set(slopes.tolist()) == {-1.0, 1.0}  # some images are flipped, some are not
    assert len(out[:, 0, 10, 0].unique()) > 3


@pytest.mark.parametrize("training", ["FGSM", "Gaussian"])
def test_cifar_recipe_writes_accuracy_and_metrics(cifar, tmp_path, training):
    more = ["--training", training, "--m", "2", "--lambda-s", "0.01", "--kl", "0.1", "--k", "2"]
    content = cifar_run(cifar, tmp_path, *more)
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["accuracy"]) == {"clean", "Gaussian", "FGSM", "clean, k = 2"}
    assert all(0 <= value <= 100 for value in results["accuracy"].values())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(line["loss"] > 0 and line["examples_per_second"] > 0 for line in lines)
    sigma = lines[-1]["sigma"]
    assert len(sigma) == 8  # patches, q, k, v, o, two of the MLP, head
    assert any(abs(value - 0.1) > 1e-4 for value in sigma.values())  # the variances learn
    assert content["step"] == 6


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(cifar, tmp_path, precision):
    whole = cifar_run(cifar, tmp_path / "whole", "--precision", precision)
    half = cifar_run(cifar, tmp_path / "parts", "--precision", precision, "--stop-after", "4")
    assert half["step"] == 4
    assert not (tmp_path / "parts" / "results.json").exists()
    parts = cifar_run(cifar, tmp_path / "parts", "--precision", precision, "--resume")
    assert parts["step"] == whole["step"] == 6
    for name, value in whole["model"].items():
        assert value.equal(parts["model"][name]), name
    assert any(not value.equal(whole["model"][name]) for name, value in half["model"].items())


def test_resuming_with_other_settings_is_refused(cifar, tmp_path):
    cifar_run(cifar, tmp_path, "--stop-after", "1")
    with pytest.raises(ValueError, match="seed 1 against 0"):
        cifar_run(cifar, tmp_path, "--resume", "--seed", "1")


def test_methods_differ_in_noise_and_in_what_learns(cifar, tmp_path):
    ends = {}
    for method in ("plain", "input", "fixed", "dip"):
        flags = ["--method", method, "--stop-after", "1"]
        ends[method] = cifar_run(cifar, tmp_path / method, *flags)["model"]
    assert [m for m, end in ends.items() if any("log_variance" in name for name in end)] == ["dip"]
    name = "vit.classifier.weight"
    # dip and fixed: the same first step
    assert len({tuple(end[name].flatten().tolist()) for end in ends.values()}) >= 3
    assert ends["fixed"][name].allclose(ends["dip"][name], atol=1e-2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--m", "0"], "--m: expected at least 1"),
        (["--accumulate", "3"], "--accumulate: expected a divisor"),
        (["--lambda-s", "0.1"], "--lambda-s: expected 0 with --m 1"),
        (["--method", "plain", "--kl", "1"], "expected with --method dip only"),
        (["--resume"], "--resume: expected"),
        (["--method", "plain", "--k", "2"], "--k: expected"),
    ],
)
def test_bad_flags_are_named(cifar, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit):
        cifar_run(cifar, tmp_path, *flags)
    assert message in capsys.readouterr().err


# ---- GSM8K: lines of question and answer ---------------------------------------------------------


@pytest.fixture(scope="module")
def gsm8k(tmp_path_factory):
    """The data folder and a local checkpoint: a tiny Llama with a tokenizer of words, both made
    here."""
    root = tmp_path_factory.mktemp("gsm8k")
    lines = [
        {
            "question": f"Ann has {a} pens and buys {b}. How many?",
            "answer": f"She has {a}+{b}=<<{a}+{b}>>\n#### {a + b}",
        }
        for a, b in itertools.product(range(1, 5), range(1, 4))
    ]
    for name, chosen in (("train.jsonl", lines[:8]), ("test.jsonl", lines[8:])):
        (root / name).write_text("".join(json.dumps(line) + "\n" for line in chosen))
    text = " ".join(f"Question: {line['question']} Answer: {line['answer']}" for line in lines)
    tokenizer = words(text)
    tokenizer.save_pretrained(root / "model")
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 128}
    model = llama(**sizes, eos_token_id=1, bos_token_id=None)
    model.save_pretrained(root / "model")
    return root


def gsm8k_flags(gsm8k, out, *more):
    where = ["--data", str(gsm8k), "--model", str(gsm8k / "model"), "--out", str(out)]
    small = "--batch 2 --rank 2 --precision fp32 --new-tokens 4"
    return [*where, *f"{small} {QUICK}".split(), *more]


def gsm8k_run(gsm8k, out, *more):
    recipe_gsm8k.main(gsm8k_flags(gsm8k, out, *more))
    return torch.load(out / "last.pt", weights_only=True)


def test_gsm8k_recipe_trains_adapters_and_variances_only(gsm8k, tmp_path):
    content = gsm8k_run(gsm8k, tmp_path, "--init-sigma", "0.2", "--m", "2", "--lambda-s", "0.01")
    assert content["step"] == 4  # one epoch of 8 examples
    names = set(content["model"])
    of_variances = ("log_variance", "log_prior", "pull")
    assert all("lora_" in name or name.endswith(of_variances) for name in names)
    # q, k, v, o, gate, up, down: once each
    assert sum(name.endswith("log_variance") for name in names) == 7
    results = json.loads((tmp_path / "results.json").read_text())
    assert 0 <= results["exact_match"] <= 100
    assert results["examples"] == 4
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


def test_gsm8k_resumes_to_the_bit(gsm8k, tmp_path):
    whole = gsm8k_run(gsm8k, tmp_path / "whole")
    gsm8k_run(gsm8k, tmp_path / "parts", "--stop-after", "2")
    parts = gsm8k_run(gsm8k, tmp_path / "parts", "--resume")
    for name, value in whole["model"].items():
        assert value.equal(parts["model"][name]), name


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            ["train", "test", "meta"],
            "got the python version (train, test, meta); unpack cifar-100-binary.tar.gz",
        ),
        (["cifar-100-binary/train.bin"], "found it one folder further in"),
        (["cifar-100-binary.tar.gz"], "found cifar-100-binary.tar.gz: unpack it"),
        (None, "--data: expected a folder"),
        ([], "found none; unpack cifar-100-binary.tar.gz"),
        (["train.bin"], "expected records of 3074 bytes"),
    ],
)
def test_a_folder_of_other_files_is_refused_in_a_sentence(tmp_path, capsys, files, said):
    folder = tmp_path / "data"
    if files is not None:
        folder.mkdir()
    for name in files or ():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"12")
    flags = ["--data", str(folder), "--out", str(tmp_path / "out"), "--device", "cpu"]
    with pytest.raises(SystemExit):
        recipe_cifar100.main(flags)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "files"), [(recipe_cifar100, "train.bin"), (recipe_gsm8k, "train.jsonl")]
)
def test_help_says_which_files_are_wanted(capsys, recipe, files):
    with pytest.raises(SystemExit):
        recipe.main(["--help"])
    text = capsys.readouterr().out
    assert text.count(files) >= 2 and "torchrun" in text  # in the description and beside --data


def test_a_batch_in_parts_has_the_same_gradient(gsm8k, tmp_path):
    moments = []
    for parts in ("1", "2"):
        flags = ["--method", "plain", "--stop-after", "1", "--accumulate", parts]
        content = gsm8k_run(gsm8k, tmp_path / parts, *flags)
        moments.append([state["exp_avg"] for state in content["optimizer"]["state"].values()])
    assert any(moment.abs().max() > 1e-4 for moment in moments[0])
    torch.testing.assert_close(*moments, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("method", ["plain", "input", "fixed"])
def test_gsm8k_baselines_run_in_mixed_precision(gsm8k, tmp_path, method):
    flags = ["--method", method, "--precision", "bf16", "--stop-after", "1"]
    assert gsm8k_run(gsm8k, tmp_path, *flags)["step"] == 1


def test_labels_count_the_answer_and_the_end_only(gsm8k):
    tokenizer = transformers.AutoTokenizer.from_pretrained(gsm8k / "model", local_files_only=True)
    examples = recipe_gsm8k.load(gsm8k / "train.jsonl")
    short = {"question": "How many?", "answer": "#### 2"}
    batch = recipe_gsm8k.collate([examples[0], short], tokenizer, 1024)
    counted = batch["labels"] != recipe_gsm8k.IGNORED
    assert batch["labels"][counted].equal(batch["input_ids"][counted])
    assert not counted[batch["attention_mask"] == 0].any()
    text = tokenizer.decode(batch["labels"][0][counted[0]])
    assert text.startswith("She has") and text.endswith("w1") and "Ann" not in text
    assert recipe_gsm8k.collate([examples[0]], tokenizer, 5)["input_ids"].shape == (1, 5)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so\n#### 1,234", "1234"),
        ("#### -7.", "-7"),
        ("#### $2.50 in all", "2.5"),
        ("#### 3 or #### 4.0", "4"),
        ("the answer is 5", None),
        ("#### none", None),
    ],
)
def test_final_number_reads_what_follows_the_marks(text, number):
    assert recipe_gsm8k.final_number(text) == number


@pytest.mark.parametrize(
    "text", ["", '{"question": "q"}\n', '{"question": "q", "answer": "no marks"}\n']
)
def test_gsm8k_refuses_other_files(tmp_path, text):
    (tmp_path / "train.jsonl").write_text(text)
    with pytest.raises(ValueError, match="--data"):
        recipe_gsm8k.load(tmp_path / "train.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["cifar100", "gsm8k"])
def test_two_workers_under_torchrun_train_and_resume(cifar, gsm8k, tmp_path, recipe):
    small = cifar_flags(cifar, tmp_path, 2), gsm8k_flags(gsm8k, tmp_path)
    flags = small[recipe == "gsm8k"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [PYTHON, *launcher, EXAMPLES / f"recipe_{recipe}.py", *flags]
    last = 6 if recipe == "cifar100" else 2
    for more, step in ((["--stop-after", "1"], 1), (["--resume"], last)):
        printed(*command, *more, timeout=500)
        assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == step
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["workers"] == 2
