"""What a release promises: one version, pinned inputs, workflows that are Makefile targets,
documents whose code runs, types."""

import contextlib
import io
import re
import shutil

import pytest
import yaml
from program_support import PYTHON, printed, ran
from source_support import ROOT, module_at

import dipkernels as dip

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
PAGES = [*(ROOT / "docs" / "guides").glob("*.md")]
PAGES += [ROOT / "docs" / "quickstart.md", ROOT / "docs" / "models.md"]
PAGES = [page for page in PAGES if "```python" in page.read_text()]
# tests/test_trainers_guide.py: each block is a program
PAGES.remove(ROOT / "docs" / "guides" / "trainers.md")


def test_version_is_one_and_semantic():
    version = dip.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", version)
    assert (
        re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE).group(1)
        == version
    )
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == version
    paper = citation["preferred-citation"]
    assert "2506.04690" in paper["url"]
    assert len(paper["authors"]) == 5
    assert "Distributional Input Projection" in paper["title"]


# ---- workflows -----------------------------------------------------------------------------------


def steps(workflow):
    for job in yaml.safe_load(workflow.read_text())["jobs"].values():
        yield from job["steps"]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_runs_targets_that_exist_and_actions_pinned_by_commit(workflow):
    text = workflow.read_text()
    called = set(re.findall(r"make ([a-z][\w-]*)", text)) | set(
        re.findall(r'target: "?([a-z][\w-]*)', text)
    )
    assert called and called <= TARGETS, called - TARGETS
    used = [step["uses"] for step in steps(workflow) if "uses" in step]
    assert used and all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", action) for action in used), used
    assert yaml.safe_load(text)["permissions"] == {"contents": "read"}
    assert "secrets." not in text and "password" not in text  # trusted publishing needs none


def test_only_publishing_may_sign_and_it_attests_before_it_uploads():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "wheels.yml").read_text())["jobs"]
    assert {name for name, job in jobs.items() if "id-token" in str(job.get("permissions"))} == {
        "publish"
    }
    assert jobs["publish"]["if"].startswith("startsWith(github.ref, 'refs/tags/v')")
    assert jobs["publish"]["needs"] == "build"
    assert jobs["publish"]["permissions"]["attestations"] == "write"
    uses = [step.get("uses", "").split("@")[0] for step in jobs["publish"]["steps"]]
    assert uses.index("actions/attest-build-provenance") < uses.index("pypa/gh-action-pypi-publish")


@pytest.mark.parametrize(
    "target, words",
    [
        ("setup-locked", "--require-hashes --no-deps -r requirements-dev.lock"),
        ("test-all", '-m "slow or not slow" --cov'),
        ("test-all", "--cov-fail-under=95"),
        ("wheel-check", "install --quiet --disable-pip-version-check --no-deps $(WHEEL)"),
        ("wheel-check", "--expect $(EXPECT) --import-share 0.08"),
        ("docs", "mkdocs build --strict"),
    ],
)
def test_a_target_asks_for_all_that_the_pages_say(target, words):
    makefile = (ROOT / "Makefile").read_text()
    (recipe,) = re.findall(rf"^{target}:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert words in recipe


# ---- pinned inputs -------------------------------------------------------------------------------


def requirements(name):
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return [line for line in lines if line]


def test_development_requirements_are_pinned_and_locked_by_hash():
    wanted = {}
    for line in [
        line
        for name in ("dev", "docs", "release")
        for line in requirements(f"requirements-{name}.txt")
    ]:
        name, _, version = line.partition("==")
        wanted[re.sub(r"\[.*\]", "", name).lower().replace("_", "-")] = version
    lock = (ROOT / "requirements-dev.lock").read_text()
    entries = re.findall(
        r"^([\w.-]+)==(\S+)((?: \\\n\s+--hash=sha256:[0-9a-f]{64})+)", lock, re.MULTILINE
    )
    # none without a hash
    assert len(entries) == len(re.findall(r"^[\w.-]+(?:\[.*\])?[=<>]=", lock, re.MULTILINE))
    locked = {name.lower(): version for name, version, _ in entries}
    del wanted["torch"]  # which build of it is the machine's choice
    assert wanted.keys() <= locked.keys(), wanted.keys() - locked.keys()
    assert all(locked[name] == version for name, version in wanted.items() if version)


def test_tools_have_one_version_in_pre_commit_and_requirements():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    wanted = set(requirements("requirements-dev.txt"))
    assert set(re.findall(r"(?:ruff|clang-format)==[\d.]+", hooks)) <= wanted


def test_dockerfile_installs_the_wheel_and_nothing_from_the_net():
    text = (ROOT / "Dockerfile").read_text()
    assert "--no-index --no-deps" in text and "smoke.py --expect cuda" in text
    assert not re.search(r"\b(curl|wget|apt-get|git clone)\b", text)
    assert re.search(r"^USER \d+", text, re.MULTILINE)
    # dist/ may hold the wheel of another machine, and the image's Python be Debian's
    assert "$(uname -m)" in text and "PIP_BREAK_SYSTEM_PACKAGES" in text


def test_make_clean_has_the_next_make_build_again(tmp_path):
    (tmp_path / "csrc").mkdir()
    (tmp_path / "v").mkdir()
    for name in ("setup.py", "pyproject.toml", "requirements-dev.txt"):
        (tmp_path / name).touch()
    for name in ("torch", "deps", "built"):
        (tmp_path / "v" / f".{name}").touch()
    make = ["make", "-f", ROOT / "Makefile", "VENV=v", "-s"]
    assert ran(*make, "-q", "setup", cwd=tmp_path).returncode == 0
    printed(*make, "clean", cwd=tmp_path)
    assert ran(*make, "-q", "setup", cwd=tmp_path).returncode == 1


# ---- documents -----------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_code_of_a_page_runs(page, tmp_path, monkeypatch):
    """The blocks of a page are one program, in the page's order."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert blocks
    if "transformers" in "".join(blocks):
        pytest.importorskip("transformers")
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile("\n".join(blocks), str(page), "exec"), {})


def test_site_lists_every_page_and_every_public_name():
    navigation = (ROOT / "mkdocs.yml").read_text()
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert {
        page for page in pages if page not in navigation and not page.startswith("results/")
    } == set()
    listed = set(
        re.findall(
            r"^::: dipkernels\.(?:\w+\.)*(\w+)",
            (ROOT / "docs" / "api.md").read_text(),
            re.MULTILINE,
        )
    )
    assert set(dip.__all__) - {"functional"} <= listed, set(dip.__all__) - listed


@pytest.mark.parametrize(
    "page",
    [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CHANGELOG.md"],
    ids=lambda p: p.stem,
)
def test_lists_of_a_page_follow_an_empty_line(page):
    """Without one the site shows a list as running text, although other viewers do not."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r"^(?![-*|\s]|\d+\.|<!--).+\n(?=(?:[-*]|\d+\.) )", text, re.MULTILINE) == []


@pytest.mark.slow
def test_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    command = [PYTHON, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path]
    done = ran(*command, env={"NO_MKDOCS_2_WARNING": "1"})  # as `make docs`: of mkdocs itself
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    assert "init_variance" in (tmp_path / "api" / "index.html").read_text()
    for page in tmp_path.rglob("index.html"):
        named = re.findall(r'(?:src|href)="([^"#?:]+)["#?]', page.read_text())
        assert [target for target in named if not (page.parent / target).exists()] == [], page


# ---- types ---------------------------------------------------------------------------------------


def test_mypy_is_strict_for_the_whole_package():
    """What `make typecheck` and the slow test below run: no module is left out."""
    section = (ROOT / "pyproject.toml").read_text().split("[tool.mypy]")[1]
    assert "strict = true" in section and 'packages = ["dipkernels"]' in section
    assert "ignore_errors" not in section
    assert "follow_imports" not in section
    assert "overrides" not in section


@pytest.mark.slow
def test_types_hold_here_and_for_strict_users():
    if shutil.which("mypy") is None:
        pytest.importorskip("mypy")
    for arguments in ([], ["--strict", "--follow-imports=silent", "tests/typing_use.py"]):
        printed(PYTHON, "-m", "mypy", *arguments)


def test_a_cell_that_holds_a_sentence_is_marked_for_the_phone():
    pytest.importorskip("mkdocs")
    hooks = module_at("tools/release/docs_hooks.py")
    long, linked = "a sentence of many words " * 3, f'<a href="{"x" * 90}">12</a>'
    html = hooks.on_page_content(f"<td>1.02</td><td>{long}</td><td>{linked}</td>", None, None, None)
    assert html == f"<td>1.02</td><td data-long>{long}</td><td>{linked}</td>"
    assert "td[data-long]" in (ROOT / "docs" / "assets" / "site.css").read_text()
