"""What a reader copies from README and docs/ runs: indented lines of Python with stand-ins for
their names, and commands."""

import ast
import copy
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from source_support import ROOT
from torch import nn
from trainer_support import llama

import dipkernels as dip

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += [ROOT / "examples" / "README.md", ROOT / "CONTRIBUTING.md"]
COMMAND = re.compile(r"(?:^|[\s`])(?:python|torchrun [\w -]+?|pytest) ((?:[\w/]+)\.py)([^\n#`]*)")


def indented(page):
    """The indented blocks outside of fences and lists, each as its lines."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    return [
        block.strip("\n")
        for block in re.findall(r"(?:(?:^ {4}[^\n]*\n)(?:\n(?= {4}))?)+", text, re.MULTILINE)
    ]


def is_python(block):
    return bool(
        re.match(
            r"    (dip\.|print\(dip\.|diagnostics\.|from \w+|import |model = |loss\.|torch\.save)",
            block,
        )
    )


# ---- Python --------------------------------------------------------------------------------------


def experts():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 8, 8))

        def forward(self, x):
            return torch.einsum("btk,ekn->btn", x, self.weight)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.experts = nn.Embedding(16, 8), Experts()
            self.gate = nn.Linear(8, 8, bias=False)

        def forward(self, input_ids):
            h = self.embed(input_ids)
            return self.experts(h) * self.gate(h)

    return nn.ModuleDict({"block": Block()}), torch.randint(16, (2, 5))


class Wrapped(nn.Module):
    """Gives a child a dotted name, as the patterns of the page expect."""

    def __init__(self, **children):
        super().__init__()
        self.layers = nn.ModuleDict(children)

    def forward(self, *args, **kwargs):
        for child in self.layers.values():
            out = child(*args, **kwargs)
        return out


class Attention(nn.Module):
    def __init__(self, *names):
        super().__init__()
        for name in names:
            setattr(self, name, nn.Linear(8, 8))

    def forward(self, x):
        return sum(layer(x) for layer in self.children())


def small(**names):
    x, y = torch.randn(6, 8), torch.randint(3, (6,))
    model = dip.convert(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 3)))
    loss = F.cross_entropy(model(x), y)
    return {
        "model": model,
        "x": x,
        "y": y,
        "batch": x,
        "batches": [x],
        "loss": loss,
        "F": F,
        **names,
    }


def stand_ins(line):
    """What the line's names are, for a reader who is where the page is."""
    if "*.experts" in line:
        model, tokens = experts()
        return {"model": Wrapped(block=model["block"]), "tokens": tokens}
    if "*.upsample" in line:
        model = Wrapped(upsample=nn.ConvTranspose2d(3, 3, 2))
        return {"model": model, "images": torch.rand(2, 3, 4, 4)}
    if "*.mixer" in line:
        model = Wrapped(mixer=nn.Conv1d(6, 6, 3, padding=1))
        return {"model": model, "images": torch.rand(2, 6, 5)}
    if "q_proj" in line:
        names = Attention("q_proj", "k_proj", "v_proj"), Attention("gate_proj", "up_proj")
        return {"model": nn.Sequential(*names)}
    if "producer" in line:
        model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 2))
        return {"model": model, "x": torch.randn(4, 8)}
    if "query" in line:
        return {"model": Attention("query", "key", "value")}
    if "peft" in line:
        peft = pytest.importorskip("peft")
        return {"peft": peft, "base": llama(), "r": 2}
    return small()


# tests/test_trainers_guide.py loads by from_pretrained what its recipe has saved.
BLOCKS = [
    (page, b) for page in PAGES for b in indented(page) if is_python(b) and "AutoModel" not in b
]


@pytest.mark.parametrize(
    ("page", "block"), BLOCKS, ids=[f"{page.stem}-{i}" for i, (page, _) in enumerate(BLOCKS)]
)
def test_indented_python_runs(page, block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    torch.manual_seed(0)
    lines = [line[4:] for line in block.splitlines() if line.strip()]
    # alternatives, each for another model
    apart = all(line.startswith("dip.convert") for line in lines)
    for part in [[line] for line in lines] if apart else [lines]:
        names = {"dip": dip, "torch": torch, "nn": nn, **stand_ins(" ".join(part))}
        code = "\n".join(part).replace("LoraConfig(...)", 'LoraConfig(target_modules=["q_proj"])')
        if "peft.PeftModel" in code:  # each half of the block starts from the plain network
            code = code.replace("model = peft.PeftModel", "base = fresh\nmodel = peft.PeftModel")
            names["fresh"] = copy.deepcopy(names["base"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(compile(code, page.name, "exec"), names)


def test_blocks_of_python_are_found():
    found = {page.stem for page, _ in BLOCKS}
    assert {"models", "trainers"} <= found and len(BLOCKS) >= 7


# ---- commands ------------------------------------------------------------------------------------


def sources(script):
    """The script and the modules beside it that it imports: where its flags are."""
    text = script.read_text()
    for name in re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE):
        beside = script.with_name(f"{name}.py")
        text += beside.read_text() if beside.exists() else ""
    return text


def test_commands_name_scripts_and_flags_that_exist():
    commands = [(page, *found) for page in PAGES for found in COMMAND.findall(page.read_text())]
    assert len(commands) > 25
    for page, name, rest in commands:
        script = ROOT / name
        assert script.exists(), (page.name, name)
        for flag in re.findall(r"(?<!\S)(--[a-z][\w-]*)", rest.partition(" > ")[0]):
            if not name.startswith(("tests/", "setup")):
                assert f'"{flag}"' in sources(script), (page.name, name, flag)
        for path in re.findall(r"(?<!\S)((?:benchmarks|docs|examples)/[\w./-]+)", rest):
            assert (ROOT / path).exists(), (page.name, path)


def test_every_flag_of_an_example_says_what_it_is_for():
    for path in (ROOT / "examples").rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            name = isinstance(call, ast.Call) and ast.unparse(call.func)
            if name in ("parser.add_argument", "add"):
                assert "help" in {k.arg for k in call.keywords}, (path.name, ast.unparse(call))


def test_make_targets_exist():
    rules = re.findall(r"^([\w -]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    targets = {target for rule in rules for target in rule.split()}
    for page in PAGES:
        code = " ".join([*re.findall(r"`([^`\n]+)`", page.read_text()), *indented(page)])
        for name in re.findall(r"\bmake ([a-z][\w-]*)", code):
            assert name in targets, (page.name, name)


def test_a_fence_is_python_or_runs_nowhere():
    """Every fenced block is run by a test: those of README by tests/test_docs.py, of guides and
    models.md by tests/test_release.py."""
    guides = (page.name for page in (ROOT / "docs" / "guides").glob("*.md"))
    run = {"README.md", "quickstart.md", "models.md", "cluster.md", *guides}
    for page in PAGES:
        if "```python" in page.read_text():
            assert page.name in run, page


@pytest.mark.parametrize("number", range(3))
def test_code_of_the_cluster_page_runs(number, one_rank):
    """On one process, with stand-ins for what a launcher and a model give."""
    page = (ROOT / "docs" / "cluster.md").read_text()
    block = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[number]
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            blocks = (nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2))
            self.blocks = nn.ModuleList(blocks)

        def forward(self, x):
            for each in self.blocks:
                x = each(x)
            return x

    names = {"torch": torch, "dip": dip, "model": dip.convert(Model()), "seed": 1, "run_key": 100}
    names |= {"data_parallel_rank": 0, "step": 3, "rank": 0, "examples_per_rank": 6}
    names |= {"x": torch.randn(6, 4), "y": torch.randn(6, 4)}
    names |= {"loss_fn": F.mse_loss, "mesh": init_device_mesh("cpu", (1,))}
    names |= {"fully_shard": fully_shard, "MixedPrecisionPolicy": MixedPrecisionPolicy}
    exec(compile(block, "cluster.md", "exec"), names)
