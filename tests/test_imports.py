"""Which way imports go, what `lint` leaves out, and that no method is named in Python."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from difftrain.language.names import standard

PACKAGE = Path(__file__).parent.parent / "difftrain"
FILES = sorted(PACKAGE.rglob("*.py"))
STANDARD = sys.stdlib_module_names | {"difftrain"}
OUR = {"language", "graph", "compiler", "models", "training", "sampling", "export", "importers"}
OUR |= {"commands"}

# folder: (packages from outside, folders of ours)
MAY_IMPORT = {
    "language": ({"lark"}, {"language"}),
    "importers": ({"yaml"}, {"language", "importers"}),
    "graph": ({"networkx"}, {"language", "graph"}),
    "compiler": ({"networkx", "torch", "triton"}, {"language", "graph", "compiler"}),
    "models": (
        {
            "torch",
            "diffusers",
            "transformers",
            "safetensors",
            "tokenizers",
            "numpy",
            "huggingface_hub",
            "triton",
        },
        {"language", "models"},
    ),
    "sampling": (
        {"torch", "numpy", "PIL", "torchmetrics"},
        {"language", "graph", "compiler", "models", "sampling"},
    ),
    "training": (
        {"torch", "numpy", "PIL", "tqdm", "safetensors", "tensorboard"},
        {"language", "graph", "compiler", "models", "sampling", "training"},
    ),
    "export": (
        {
            "torch",
            "numpy",
            "diffusers",
            "transformers",
            "tokenizers",
            "safetensors",
            "onnx",
            "onnx_ir",
            "onnxruntime",
        },
        {"language", "graph", "compiler", "models", "sampling", "training", "export"},
    ),
    "commands": (set(), OUR),
    "": (set(), OUR),  # the package's own front: difftrain.read, difftrain.objective, cli
}
# seconds to import: inside functions only
LAZY = {
    "diffusers",
    "transformers",
    "huggingface_hub",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "torchmetrics",
}


def folder_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else ""


def imports(tree: ast.AST):
    """(dotted module, whether it stands at the top level) of every import."""
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((alias.name, id(node) in top) for alias in names)
            case ast.ImportFrom(module=str(module), level=0):
                yield module, id(node) in top
            case ast.ImportFrom():
                yield ".", id(node) in top


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_direction(file):
    outside, ours = MAY_IMPORT[folder_of(file)]
    for module, at_top in imports(ast.parse(file.read_text(encoding="utf-8"))):
        head, *rest = module.split(".")
        assert head, f"{file.name}: imports say the whole name"
        assert head in STANDARD | outside, f"{file.name}: {module}"
        assert not (at_top and head in LAZY), f"{file.name}: {module} belongs in the function"
        if head == "difftrain" and rest and rest[0] in OUR:
            assert rest[0] in ours, f"{file.name}: {module}"


LIGHT = ["language", "importers", "graph"]


@pytest.mark.parametrize("file", [f for f in FILES if folder_of(f) in LIGHT], ids=lambda f: f.name)
def test_torch_is_far(file):
    names = {m.split(".")[0] for m, _ in imports(ast.parse(file.read_text(encoding="utf-8")))}
    assert not names & {"torch", "numpy", "sympy"}


def loaded_after(tmp_path, *argv: str) -> set[str]:
    """The modules that a command loads."""
    spec = tmp_path / "a.diff"
    spec.write_text(
        "diff 1\nobjective a { process = linear, prediction_type = flow, backbone = custom }\n"
    )
    code = f"import sys; from difftrain.cli import main; print(main({[*argv, str(spec)]!r})); "
    code += "print(*sys.modules, sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True
    )
    return set(done.stdout.splitlines())


@pytest.mark.parametrize("command", [["lint"], ["fmt"], ["explain"]], ids=" ".join)
def test_light_commands_load_little(tmp_path, command):
    loaded = loaded_after(tmp_path, *command)
    assert not loaded & {"torch", "networkx", "numpy", "yaml", "sympy"}


def test_graph_loads_no_torch(tmp_path):
    loaded = loaded_after(tmp_path, "graph")
    assert "networkx" in loaded and not loaded & {"torch", "numpy"}


BEFORE_A_STEP = """
import sys
import difftrain.commands.launch, difftrain.training.run
from difftrain.language.part import Part
from difftrain.training.parts import drawn
label = drawn("cpu", Part("encoder", "label", {}), vocabulary=["cat", "dog"])
drawn("cpu", Part("backbone", "transformer", {"depth": 1, "width": 12, "heads": 2}), text=label)
print(*sys.modules, sep="\\n")
"""


def test_a_model_stands_before_a_compiler_is_loaded():
    done = subprocess.run(
        [sys.executable, "-c", BEFORE_A_STEP], capture_output=True, text=True, cwd=PACKAGE.parent
    )
    assert done.returncode == 0, done.stderr
    late = {"torch._dynamo", "torch._inductor", "sympy", "tensorboard", "torchmetrics"}
    assert "torch" in done.stdout.split()
    assert not {*late, "diffusers", "transformers"} & set(done.stdout.split())


# ---- methods live in .diff files

# What the library or the literature calls a method, beside what the library defines.
METHODS = {
    "dream", "min_snr", "soft_min_snr", "p2", "debiased", "edm", "edm_precondition", "mean_flow",
    "meanflow", "repa", "lcm", "sct", "scd", "ict", "ct", "trig_flow", "trigflow", "offset_noise",
    "input_perturbation", "drop_condition", "self_condition", "gvp", "subvp", "vp", "ve", "ddpm",
    "logit_normal", "log_normal",
}  # fmt: skip
# Words of the library that Python sources need in another meaning.
OTHER_MEANINGS = {
    "linear": "linear forms of the algebra, and torch.nn.Linear",
    "flow": "a quantity: the direction of the path",
    "sample": "a kind of value (one number per sample), a block and a command",
    "score": "a quantity: score_hat",
    "consistency": "English",
    "discrete": "English: a process that counts steps",
    "mode": "English: the mode of a file or of a module",
}
# Files that may say some of them, and why.
ALLOWED = {
    "models/pretrained.py": ({"epsilon", "v_prediction", "ddpm"}, "foreign scheduler files"),
    "models/tokenizer.py": ({"ve"}, "the ending of `we've`"),
    "export/package.py": ({"ve"}, "the ending of `we've`"),
    "export/tokens.py": ({"ve"}, "the ending of `we've`"),
    "language/uses.py": ({"epsilon", "v_prediction", "ddpm"}, "what a foreign name means here"),
}


def library_names() -> set[str]:
    kinds = ("strategy", "process", "prediction")
    return {name for names in standard() for kind, name in names.own if kind in kinds}


def named(text: str) -> set[str]:
    return set(re.findall(r"[a-z_][a-z0-9_]*", text.lower()))


# Importers are the exception: foreign configurations name methods.
OTHERS = [f for f in FILES if folder_of(f) != "importers"]


@pytest.mark.parametrize("file", OTHERS, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_no_method_is_named(file):
    path = file.relative_to(PACKAGE).as_posix()
    allowed, _ = ALLOWED.get(path, (set(), ""))
    methods = (METHODS | library_names()) - OTHER_MEANINGS.keys() - allowed
    found = named(file.read_text(encoding="utf-8")) & methods
    assert not found, f"{path} names {', '.join(sorted(found))}"
