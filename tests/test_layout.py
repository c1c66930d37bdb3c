"""How the repository is laid out: packages, the direction of imports, and the name `kernels`, which is not ours."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from setuptools import find_packages

ROOT = Path(__file__).resolve().parents[1]
HOMES = {
    "ptq": ROOT / "ptq",
    "rptq": ROOT / "rptq",
    "sparsegpt": ROOT / "sparsegpt",
    "lowbit": ROOT / "kernels" / "lowbit",
}
MAY_IMPORT = {"ptq": {"rptq", "sparsegpt", "lowbit"}, "rptq": set(), "sparsegpt": set(), "lowbit": set()}
SOURCES = [path for home in HOMES.values() for path in sorted(home.rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """Top-level names of every import in a file, those inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def python(code: str, *path: Path, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env=environment)


@pytest.mark.parametrize("package", HOMES)
def test_imports_point_one_way(package):
    files = sorted(HOMES[package].rglob("*.py"))
    assert len(files) > 3
    for path in files:
        ours = imported(path) & HOMES.keys() - {package}
        assert ours <= MAY_IMPORT[package], f"{path}: imports {ours - MAY_IMPORT[package]}"


def test_the_container_of_kernels_is_no_package():
    assert (ROOT / "kernels" / "lowbit" / "__init__.py").is_file()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_what_is_installed_is_our_four_packages():
    options = {"include": ["ptq*", "rptq*", "sparsegpt*", "lowbit*"]}
    text = (ROOT / "pyproject.toml").read_text(encoding="utf8")
    assert 'where = [".", "kernels"]' in text and 'include = ["ptq*", "rptq*", "sparsegpt*", "lowbit*"]' in text
    found = {name for where in (ROOT, ROOT / "kernels") for name in find_packages(str(where), **options)}
    assert {name.split(".")[0] for name in found} == set(HOMES)
    folders = {path.parent for path in SOURCES}
    assert len(found) == len(folders), f"a folder of sources without __init__.py among {sorted(map(str, folders))}"


def test_an_installed_kernels_package_wins_over_our_folder(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("WHOSE = 'theirs'\n")
    # the empty entry of -c puts the repository's root first, where our folder of that name lies
    done = python("import lowbit, kernels; print(kernels.WHOSE)", ROOT / "kernels", tmp_path)
    assert done.stdout == "theirs\n", done.stderr


def test_transformers_does_not_take_our_folder_for_that_package():
    # it may look into the folder, but must not find a package there; where theirs is installed, theirs has a file
    theirs = "transformers.utils.is_kernels_available() and __import__('kernels').__file__ is None"
    done = python(f"import sys, transformers; print('kernels' in sys.modules, {theirs})")
    assert done.stdout == "False False\n", done.stderr


def test_importing_ptq_is_light():
    heavy = "{'torch', 'transformers', 'safetensors', 'sklearn', 'datasets', 'matplotlib'}"
    done = python(f"import sys, ptq; print(sorted({heavy} & set(sys.modules)))", ROOT, ROOT / "kernels")
    assert done.stdout == "[]\n", done.stdout + done.stderr


@pytest.mark.parametrize("order", ["import ptq, transformers", "import transformers; import ptq"])
def test_ptq_registers_whichever_is_imported_first(order, tmp_path):
    code = f"{order}; print(transformers.AutoConfig.for_model('ptq_opt').model_type)"
    done = python(code, ROOT, ROOT / "kernels", cwd=tmp_path)
    assert done.stdout == "ptq_opt\n", done.stderr


def test_sources_are_finished_and_safe():
    unfinished = ("TO" + "DO", "FIX" + "ME", "NotImplemented" + "Error", "XXX")
    unsafe = ("torch." + "save(", "torch." + "load(", "import pickle", "yaml.load(", "shell=True", " eval(", " exec(")
    for path in SOURCES:
        text = path.read_text(encoding="utf8")
        assert not [word for word in unfinished + unsafe if word in text], path


def test_tests_cannot_reach_the_network():
    import socket

    with pytest.raises(AssertionError, match="tried to reach the network"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)  # an address of no one
    assert os.environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize(
    "first", ["lowbit.attention", "lowbit.cache", "transformers.modeling_utils", "ptq.hf_quantizer"]
)
def test_any_import_order_works_after_ptq(first):
    # Registration runs while transformers is being imported: what it imports must not be what imported transformers.
    then = "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known; assert 'ptq' in known"
    code = f"import ptq, {first}, transformers.modeling_utils; {then}"
    done = python(code, ROOT, ROOT / "kernels")
    assert done.returncode == 0, done.stderr
