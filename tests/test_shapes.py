"""Every shape that a comment or a docstring claims holds while small models run.

The claims are read from the source, and checked by a trace function while everything is called:

    x = f(y)  # (B, N, C)           x, once the line has run; likewise `return`; `# name (B,)`: that
    "images (B, 3, H, W) -> (B,)"   in the docstring of a function: the argument of that name, or
                                    before an arrow the next; else what is returned, in order
    mask: Tensor  # (B, N)          of a NamedTuple: of every one that is passed or returned
    docstring of a class            what comes last is what forward or self[...] returns
    any other text                  repeats a claim that is checked

Within a call a symbol has one value: that of the variable, argument or attribute of this name, or
what it met first. FACTS fixes some for all calls, and sizes differ, so that a symbol in the wrong
place does not fit.
"""

import ast
import re
import sys
import tempfile
import tokenize
import warnings
from collections import defaultdict
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import ROOT, randomize

import encoder
import evaluate
import flow
import losses
import sample
import spectral
import train
from common import data
from common import shapes as built_in
from common.inception import inception_features, load_inception
from common.weights import RANDOM, Scripted

FILES = {path.stem: path for path in (*ROOT.glob("*.py"), *ROOT.glob("common/[a-z]*.py"))}
SYMBOLS = (
    "B C C_t D H K L M N N_ R S T V W d g h hd m n p w batch buffer channels classes cols corners "
    "count depth dimension grid head_dim heads kinds length num_patches num_tokens places rows "
    "share side size width"
).split()
NOT_SHAPES = {
    "(x, y) (x, x_hat) (mu, alpha) (u, logdet) (z, labels) (j, j + hd/2)": "tuples of values",
    "(Attention, MLP, Block) (sigma, masks) (forward, backward, ...)": "lists in words",
    "(seed, i) (seed, i, 0) (seed, i, 2) (seed, n) (seed, s) (seed, step)": "seeds",
    "(epoch, index) (image, label)": "keys and items of a dataset",
    "(row, column) (row, column, colour) (17, 17, 7) (7, 17, 17)": "orders of axes",
    "(0, 0) (0, I) (0, 1)": "a mask ratio or a place, Gaussians, ranges",
    "(x, tau, h) (x_tau, tau, h) (mu, sigma and mu_s, sigma_s)": "arguments, names",
}
NOT_SHAPES = [shape for line in NOT_SHAPES for shape in re.findall(r"\([^()]*\)", line)]
STATED_AGAIN = {  # claims that nothing here can see: where they are asserted in other words
    "flow (depth, 2, B, heads, num_tokens, hd)": "no line makes it; below",
    "data.training_loader (share, 3, H, W)": "of its batches; the loop has it too",
    "data.training_loader (share,)": "the same",
    "data.write_npz (n, H, W, 3)": "in a file; test_sample.py",
    "data.write_npz (n,)": "in a file; test_sample.py",
    "measuring.look (B, ...)": "in a dictionary with names of its caller; test_evaluate.py",
    "measuring.look (n, ...)": "the same",
    "data (3, H, W)": "of one picture; common/shapes.py has it of to_tensor",
    "evaluate (N, 2023)": "sFID's features; common/inception.py has them as (B, 2023)",
    "evaluate (B,)": "labels of a batch; common/data.py has them as (n,)",
}
MEANT = {  # (function, how the text before a shape ends): the arguments or the result it means
    ("flow.KeyValueCache.append", "keys and values"): "new",
    ("flow.jacobi", "u -> x,"): "u result",
    ("flow.NormalizingFlow.inverse", "noise"): "u",
    ("losses.discriminator_loss", "two times"): "real_logits fake_logits",
    ("emigm.MaskedPrior.sample", "u and order"): "order",
    ("spectral.ConjugateGradients.__init__", "eps"): "shift",
    ("evaluate.frequency_errors", "x_hat"): "error",
    ("evaluate.peak_signal_to_noise", "uint8"): "a b",
    ("evaluate.neighbour_radii", "each row of"): "features",
    ("evaluate.precision_recall", "pool features"): "samples",
    ("evaluate.precision_recall", "2048),"): "reference",
    ("evaluate.frechet_distance", "means"): "mu1 mu2",
    ("evaluate.frechet_distance", "covariances"): "sigma1 sigma2",
}


# --------------------------------------------------------------------------------------------------
# Reading the claims


class Claim(NamedTuple):
    where: str  # module.qualified.name
    shape: str  # as it is written
    owners: tuple[str, ...] = ()  # arguments or variables, "result"; nothing in other text
    word: str = ""  # the last one before the shape
    each: bool = False  # of all results
    line: int = 0  # of the comment

    @property
    def key(self) -> str:
        return f"{self.where} {self.shape}"


class Function(NamedTuple):
    where: str
    claims: list[Claim]  # of its docstring
    lines: dict[int, tuple[ast.stmt, tuple[Claim, ...]]]  # all lines of statements with a claim


def normal(text: str | None) -> str:
    return re.sub(r"\s+", " ", text or "")


def dimensions(shape: str) -> list[str] | None:
    """Those of "(B, 2d, ...)" as Python expressions; None if it is something else."""
    code = re.sub(r"(\d)([A-Za-z])", r"\1*\2", shape[1:-1]).replace("^", "**").replace("'", "_")
    try:
        found = ast.parse(f"({code.rstrip(', ')},)", mode="eval").body.elts
    except SyntaxError:
        return [shape] if shape.endswith(",)") else None
    for node in (node for dimension in found for node in ast.walk(dimension)):
        known = (ast.Name, ast.BinOp, ast.BoolOp, ast.operator, ast.boolop, ast.expr_context)
        number = isinstance(node, ast.Constant) and not isinstance(node.value, float | str)
        length = isinstance(node, ast.Call) and ast.unparse(node.func) == "len"
        if not (isinstance(node, known) or number or length):
            return None
    return [ast.unparse(dimension) for dimension in found] if "," in code else None


def symbols(dimension: str) -> list[str]:
    names = re.findall(r"[A-Za-z_]\w*", re.sub(r"len\(\w+\)", "", dimension))
    return [name for name in names if name != "or"]  # "B or 2B" are two that are allowed


def shapes(text: str) -> list[tuple[int, int]]:
    """Where the shapes of a text begin and end."""
    found = [(0, 0)]
    for start in (match.start() for match in re.finditer(r"\(", text)):
        group = re.match(r"\((?:[^()]|\([^()]*\))*\)", text[start:])
        if group and start >= found[-1][1] and group[0] not in NOT_SHAPES and dimensions(group[0]):
            found.append((start, start + group.end()))
    return found[1:]


def words(text: str) -> list[str]:
    """The last three words; f(x) is none."""
    return re.findall(r"\w+", re.sub(r"\S*\w\([^()]*\)", "", text))[-3:]


def last_word(text: str) -> str:
    return re.search(r"\w*$", text.rstrip(" `"))[0]


def read_text(where: str, text: str | None) -> list[Claim]:
    text = normal(text)
    return [Claim(where, text[a:b], word=last_word(text[:a])) for a, b in shapes(text)]


def read_docstring(where: str, node: ast.FunctionDef) -> list[Claim]:
    text, claims, last = normal(ast.get_docstring(node)), [], 0
    arguments = [a for a in (*node.args.args, *node.args.kwonlyargs) if a.annotation]
    arguments = [a.arg for a in arguments if re.search("Tensor|ndarray", ast.unparse(a.annotation))]
    nameless = list(arguments)
    stops = [m.end() for m in re.finditer(r"(?<!Eq)(?<!Tab)(?<!Sec)(?<!App)\. |$", text)]
    for start, end in shapes(text):
        sentence = max([0, *(stop for stop in stops if stop <= start)])
        before, after = text[max(last, sentence) : start].rstrip(), text[end:]
        said = {word.lower() + plural for word in words(before) for plural in ("", "s")}
        owners = [a for a in arguments if a in said]
        if "->" in text[sentence:start]:
            owners = ["result"]
        elif not owners and "->" in text[end : next(s for s in stops if s >= end)] and nameless:
            owners = [nameless.pop(0)]
        for (function, ending), meant in MEANT.items():
            if function == where and text[:start].rstrip().endswith(ending):
                owners = meant.split()
        each = after.startswith(" each") or before.endswith(("each", "all"))
        owners = tuple(owners or ["result"])
        claims.append(Claim(where, text[start:end], owners, last_word(before), each))
        last = end
    return claims


class Source:
    """The claims of all modules."""

    def __init__(self):
        self.functions: dict[tuple[str, int], Function] = {}  # (file, first line)
        self.fields: dict[str, dict[str, Claim]] = defaultdict(dict)  # of NamedTuples
        self.results: dict[str, list[Claim]] = {}  # of classes
        self.text: list[Claim] = []
        for module, path in FILES.items():
            with tokenize.open(path) as stream:
                tokens = list(tokenize.generate_tokens(stream.readline))
            self.comments = {
                t.start[0]: normal(t.string[1:]).strip()
                for t in tokens
                if t.type == tokenize.COMMENT and shapes(t.string)
            }
            tree = ast.parse(path.read_text())
            self.text += read_text(module, ast.get_docstring(tree))
            self.visit(tree, module, str(path), None)
            for comment in self.comments.values():  # on lines of their own
                self.text += read_text(module, comment)
        every = [c for function in self.functions.values() for c in function.claims]
        for function in self.functions.values():
            every += {c: 0 for _, claims in function.lines.values() for c in claims}
        every += [claim for fields in self.fields.values() for claim in fields.values()]
        every += [claim for claims in self.results.values() for claim in claims]
        self.text += [claim for claim in every if claim.key in STATED_AGAIN]
        self.claims = {claim for claim in every if claim.key not in STATED_AGAIN}

    def visit(self, tree: ast.AST, where: str, path: str, function: Function | None) -> None:
        for node in ast.iter_child_nodes(tree):
            if isinstance(node, ast.ClassDef):
                self.read_class(node, f"{where}.{node.name}")
                self.visit(node, f"{where}.{node.name}", path, None)
            elif isinstance(node, ast.FunctionDef):
                name = f"{where}.{node.name}"
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                inner = self.functions[path, first] = Function(name, read_docstring(name, node), {})
                self.visit(node, name, path, inner)
            else:
                simple = isinstance(node, ast.stmt) and not hasattr(node, "body")
                if function and simple and node.end_lineno in self.comments:
                    claims = self.read_comment(node, where, self.comments.pop(node.end_lineno))
                    for line in range(node.lineno, node.end_lineno + 1):
                        function.lines[line] = node, claims
                self.visit(node, where, path, function)

    def read_comment(self, node: ast.stmt, where: str, comment: str) -> tuple[Claim, ...]:
        targets = getattr(node, "targets", [getattr(node, "target", None)])[0]
        targets = targets.elts if isinstance(targets, ast.Tuple) else [targets]
        names = ["result" if target is None else ast.unparse(target) for target in targets]
        if isinstance(node, ast.Expr):  # self.register_buffer("name", ...)
            names = [f"self.{node.value.args[0].value}"]
        found, claims = shapes(comment), []
        for i, (start, end) in enumerate(found):
            owners, before = names if len(found) == 1 else [names[i]], comment[:start].strip()
            if re.fullmatch(r"[a-z]\w*", before):
                owners = [MEANT.get((where, before), before)]
            word = owners[0].removeprefix("self.")
            claims.append(
                Claim(where, comment[start:end], tuple(owners), word, line=node.end_lineno)
            )
        return tuple(claims)

    def read_class(self, node: ast.ClassDef, name: str) -> None:
        text = normal(ast.get_docstring(node))
        found = shapes(text)
        if "NamedTuple" in map(ast.unparse, node.bases):
            for field in (f for f in node.body if isinstance(f, ast.AnnAssign)):
                comment = self.comments.pop(field.lineno, text)  # or one shape for all fields
                if shapes(comment) and re.search("Tensor|ndarray", ast.unparse(field.annotation)):
                    claim = Claim(name, comment[slice(*shapes(comment)[0])], word=field.target.id)
                    self.fields[name][field.target.id] = claim
            return
        methods = {f.name for f in node.body if isinstance(f, ast.FunctionDef)}
        if found and methods & {"forward", "__getitem__", "convert"}:
            mark = re.search(r".*(->|self\[range\])[^.]*", text)
            last = [s for s in found if mark and mark.end(1) <= s[0] < mark.end()] or found[-1:]
            self.results[name] = [Claim(name, text[slice(*s)], ("result",)) for s in last]
            text = text[: last[0][0]] + text[last[-1][1] :]
        self.text += read_text(name, text)


# --------------------------------------------------------------------------------------------------
# Checking them


def leaves(value: Any) -> list:
    """The tensors and arrays in nested tuples, lists and dictionaries."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return [value]
    value = list(value.values()) if isinstance(value, dict) else value
    return [x for v in value for x in leaves(v)] if isinstance(value, list | tuple) else []


class Call:
    """A running call: what the symbols mean in it, and what is still to be checked."""

    def __init__(self, checker: "Checker", frame: Any, function: Function):
        self.checker, self.frame, self.function = checker, frame, function
        module = function.where.split(".")[0]
        self.met = {}
        for place in ("", module, function.where):
            self.met |= checker.facts.get(place, {})
        self.statement, self.of_return, self.raised = None, (), False
        self.met_in_loop: dict[ast.stmt | None, set[str]] = defaultdict(set)
        self.given = dict(frame.f_locals)
        self.open = [(c, [self.given.get(owner) for owner in c.owners]) for c in function.claims]
        self.check_open(list(self.given.values()))

    def value(self, symbol: str) -> int | None:
        here = self.frame.f_locals
        value = self.met.get(symbol, here.get(symbol, getattr(here.get("self"), symbol, None)))
        value = len(value) if isinstance(value, list) else value
        return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None

    def fits(self, claim: Claim, shape: tuple[int, ...]) -> bool | None:
        """Whether the shape is as claimed; None while too little is known."""
        wanted, met = dimensions(claim.shape), {}
        if wanted[0] == "...":
            wanted = wanted[1:]
            shape = shape[len(shape) - len(wanted) :]
        if len(wanted) != len(shape):
            return False
        todo = list(zip(wanted, shape, strict=True))
        for dimension, size in todo * 2:  # what the first round cannot tell, the second may
            names = symbols(dimension)
            scope = {name: met.get(name, self.value(name)) for name in names}
            unknown = [name for name in names if scope[name] is None]
            scope = {**self.frame.f_locals, **scope}
            if len(unknown) == 1:  # solve for it: no dimension is more than linear in one symbol
                low, high = (eval(dimension, {**scope, unknown[0]: x}) for x in (0, 1))
                met[unknown[0]] = scope[unknown[0]] = round((size - low) / (high - low))
            elif unknown:
                continue
            if size not in [eval(part, dict(scope)) for part in dimension.split(" or ")]:
                return False
            todo = [item for item in todo if item != (dimension, size)]
        if not todo:
            self.met |= met
            self.met_in_loop[self.statement] |= met.keys()
        return None if todo else True

    def may_be(self, claim: Claim, part: Any) -> bool:
        return part is None or self.fits(claim, tuple(leaves(part)[0].shape)) is not False

    def check(self, claim: Claim, values: Any) -> bool:
        """Compare all tensors in `values` with a claim; False if that could not be decided yet."""
        if claim.key in STATED_AGAIN:
            return True
        # Entries of a dictionary may differ; a symbol then has no value in the rest of the call.
        differ = isinstance(values, list) and any(isinstance(value, dict) for value in values)
        verdicts, before, after = [], self.met, []
        for x in leaves(values):
            self.met = dict(before) if differ else self.met
            verdicts.append(self.fits(claim, tuple(x.shape)))
            after.append(self.met.items())
            if verdicts[-1] is False:
                known = {s: self.value(s) for d in dimensions(claim.shape) for s in symbols(d)}
                self.checker.errors.setdefault(claim, f"{claim.key}: {tuple(x.shape)}, {known}")
        if differ and after:
            self.met = dict(set.intersection(*map(set, after)))
        if verdicts and None not in verdicts:
            self.checker.checked.add(claim)
        return None not in verdicts

    def check_open(self, seen: list) -> None:
        """Check the arguments that can be checked by now, and the NamedTuples among `seen`."""
        self.open = [
            (claim, values) for claim, values in self.open if not self.check(claim, values)
        ]
        for x in seen:
            for name, claim in self.checker.source.fields.get(full_name(type(x)), {}).items():
                self.check(claim, getattr(x, name))

    def line(self, number: int | None) -> None:
        """A line begins, or with None the call ends: check what the statement before it made."""
        last, (self.statement, _) = self.statement, self.function.lines.get(number, (None, ()))
        if last is None or (last is self.statement and last.lineno != last.end_lineno):
            return
        claims = self.function.lines[last.lineno][1]
        if isinstance(last, ast.Return):
            self.of_return = claims
            return
        for symbol in self.met_in_loop.pop(last, ()):  # the line has run before: another round
            self.met.pop(symbol, None)
        now, self.statement = self.statement, last
        for claim in claims:
            self.check(claim, [eval(owner, {}, self.frame.f_locals) for owner in claim.owners])
        self.statement = now

    def end(self, value: Any) -> None:
        """The call returns."""
        self.line(None)
        for claim in self.of_return:
            self.check(claim, [value])
        claims = [claim for claim in self.function.claims if "result" in claim.owners]
        if self.frame.f_code.co_name in ("forward", "__getitem__"):
            for kind in type(self.given.get("self")).__mro__:
                claims = claims + self.checker.source.results.get(full_name(kind), [])
        parts = [
            x for x in (value if isinstance(value, tuple) else [value]) if x is None or leaves(x)
        ]
        for number, claim in enumerate(claims):
            if claim.each:
                self.check(claim, parts)
            elif isinstance(value, dict):
                self.check(claim, value.get(claim.word))
            elif parts:  # in order; a part of which nothing is said is passed
                spare = len(parts) - len(claims) + number
                while spare > 0 and not self.may_be(claim, parts[0]):
                    parts, spare = parts[1:], spare - 1
                self.check(claim, parts[0])
                parts = parts[1:] or parts
        self.check_open([value])


def full_name(kind: type) -> str:
    return f"{kind.__module__.removeprefix('common.')}.{kind.__name__}"


class Checker:
    """A context in which the claims are checked."""

    def __init__(self):
        self.source, self.facts = Source(), {}
        self.checked: set[Claim] = set()
        self.errors: dict[Claim, str] = {}  # the first of each

    def __enter__(self) -> None:
        self.before = sys.gettrace()
        sys.settrace(self.trace)

    def __exit__(self, *error: Any) -> None:
        sys.settrace(self.before)

    def trace(self, frame: Any, event: str, argument: Any) -> Any:
        code = frame.f_code
        function = self.source.functions.get((code.co_filename, code.co_firstlineno))
        if function is None or code.co_name.startswith("<"):
            return None
        call = Call(self, frame, function)
        frame.f_trace_lines = bool(function.lines)

        def local(frame: Any, event: str, argument: Any) -> Any:
            if event == "exception":
                call.statement, call.raised = None, True
            elif event == "line":
                call.raised = False  # or it was caught
                call.line(frame.f_lineno)
            elif not call.raised:
                call.end(argument)
            return local

        return local


# --------------------------------------------------------------------------------------------------
# Running everything

SIZES = dict(image_size=24, patch_size=8, width=84, depth=2, heads=7, num_latents=5, latent_dim=6)
SIZES |= dict(emigm_width=60, emigm_heads=4, emigm_depths=(1, 2), emigm_buffer=3, emigm_steps=3)
SIZES |= dict(emigm_head=(56, 2), emigm_interval=(0.0, 1.0), num_classes=10, drop_path=0.1)
SIZES |= dict(flow_width=39, flow_depths=(1, 2), flow_head_dim=13)
BATCH = 11
FACTS = {
    "": dict(K=5, d=6, N=9),
    **dict.fromkeys(("encoder", "decoder"), dict(C=84, p=8, g=3, hd=12)),
    "flow": dict(C=39, hd=13),
    "emigm": dict(C=60, W=56, R=4),
    "spectral": dict(D=30),
}
CPU = torch.device("cpu")


def small_config(**options: Any) -> train.Config:
    config = train.preset_config("shapes", **SIZES)
    return replace(config, mask_warmup=0, device="cpu", **options)


def run_the_model(checker: Checker, out: Path) -> None:
    """Both phases and sample.py as commands; the flow's inverses; spectral.py."""
    checker.facts = FACTS
    joint = dict(perceptual_weight=1.1, vgg="random", teachers=("hog",))
    config = small_config(steps=1, batch_size=BATCH, out=str(out / "one"), **joint)
    train.main(config)
    second = dict(phase="decoder", init=str(out / "one/model.pt"), out=str(out / "two"))
    train.main(replace(config, **second, gan_weight=0.05))
    given = ("--between circle star --out s.png", "--reconstruct circle star star --out s.png")
    for flags in ("--num 4 --npz s.npz", "--num 4 --out s.png", *given):
        flags = f"{out / 'one/model.pt'} --batch-size 3 --device cpu {flags}"
        sample.main(sample.parse_arguments(flags.split()))
    flags = f"{out / 'one/model.pt'} --images 3 --tolerance 1e-3 --device cpu"
    spectral.main(spectral.parse_arguments(flags.split()))

    third = dict(
        prior="emigm", freeze_autoencoder=True, init=second["init"], out=str(out / "three")
    )
    train.main(replace(config, **third))
    flags = f"{out / 'three/model.pt'} --num 4 --batch-size 3 --device cpu --out s.png"
    sample.main(sample.parse_arguments(flags.split()))

    checker.facts = {**FACTS, "": {**FACTS[""], "B": BATCH}}
    model = randomize(train.MIMFlow(config))
    draws = train.draw_randomness(config, 0, CPU).rows(0, BATCH)
    images, labels = torch.randn(BATCH, 3, 24, 24), torch.arange(BATCH) % 10 - 1
    _, z = model.latents(images, draws)
    model.decoder(z, draws.branch_scales)
    for sampler in ("sequential", "jacobi"):
        model.flow.inverse(z, labels, sampler=sampler)
    z = model.denoise(z, labels)
    losses.pixel_loss(images, images, draws.mask, 5.0)
    # Guidance makes one batch of 2 B out of two, for the functions below this one.
    checker.facts = {**FACTS, "flow.Predictor": dict(B=BATCH)}
    for rule in ("tarflow", "starflow"):
        model.sample(z, labels, 1.0, rule=rule)
    checker.facts = {**FACTS, "flow": dict(C=39, hd=13, L=4), "flow.Predictor": dict(B=BATCH)}
    rows = torch.stack([built_in.caption_row("A b, c", {"b": 0, "c": 2}, 4)] * BATCH)
    reader = randomize(train.MIMFlow(replace(config, caption_words=4)))
    reader.sample(reader.flow(z, rows)[0], rows, 1.0)
    checker.facts = FACTS
    keep, z = torch.arange(BATCH) != 1, z.double()
    jacobian = spectral.Jacobian(model.double().flow, z, labels)
    solver = spectral.ConjugateGradients(jacobian, torch.ones(BATCH).double(), 3)
    solver.solve(torch.randn(BATCH, 30).double(), torch.zeros(BATCH))
    solver.restrict(jacobian.rows(keep), keep)


def run_the_judges(checker: Checker, out: Path) -> None:
    """Losses on pictures that are not square, the frozen networks."""
    checker.facts = {"": dict(B=2, h=3, w=4)}
    wide = torch.randn(2, 2, 3, 40, 48)
    losses.pixel_loss(*wide)
    judge = losses.PatchDiscriminator()
    losses.discriminator_loss(judge(wide[0]), judge(wide[1]))
    losses.generator_loss(judge(wide[0]))
    losses.Perceptual(RANDOM)(*wide)
    checker.facts = {"": dict(B=3, N=4, g=2)}
    for name, teacher in losses.TEACHERS.items():
        teacher(*([] if name == "hog" else [RANDOM]), grid=2)(torch.randn(3, 3, 24, 24))
    checker.facts = {"": dict(B=2, N=4)}
    own = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 8, 8), torch.nn.Flatten(2)
    )  # 4 patches, 9 channels
    with tempfile.NamedTemporaryFile(suffix=".pt") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.trace(own, torch.zeros(2, 3, 24, 24)).save(file.name)
        Scripted(file.name, 2, 24)(torch.randn(2, 3, 24, 24))


def run_the_measures(checker: Checker, out: Path) -> None:
    """evaluate.py's commands on the model; its numbers of generation on few pictures."""
    checkpoint, flags = out / "one/model.pt", "--num 3 --batch-size 3 --device cpu"
    checker.facts = {**FACTS, "evaluate.moments": dict(N=3)}  # pictures, not patches
    for command in (
        f"reconstruction {checkpoint} {flags} --vgg random --inception random",
        f"probe {checkpoint} {flags} --num-train 5 --epochs 1",
        f"likelihood {checkpoint} {flags}",
        f"map {checkpoint} {flags} --num 5",
        f"cost {checkpoint} --batch-size 3 --batches 3 --tokens 5 --runs 1 --device cpu",
    ):
        evaluate.main(evaluate.parse_arguments(command.split()))
    checker.facts = {}
    pictures = np.random.default_rng(0).integers(0, 255, (6, 20, 30, 3), dtype=np.uint8)
    statistics = {"mu": 2048, "sigma": (2048, 2048), "mu_s": 2023, "sigma_s": (2023, 2023)}
    np.savez("a.npz", pictures, **{name: np.zeros(size) for name, size in statistics.items()})
    given = data.PictureSet(Path("a.npz"))
    given.statistics()
    network = load_inception("random", CPU)[0]
    pool, spatial = inception_features(network, given[range(2)])
    evaluate.inception_score(network, torch.from_numpy(pool))
    moments = evaluate.moments(pool[:, :7])
    evaluate.frechet_distance(*moments, *moments)
    evaluate.precision_recall(torch.randn(4, 2048), torch.randn(5, 2048))
    (out / "pictures").mkdir()
    data.save_png(torch.zeros(3, 3, 20, 30), 3, out / "pictures/a.png")
    data.PictureSet(out / "pictures")[range(1)]


@pytest.fixture(scope="module")
def checker(tmp_path_factory) -> Checker:
    """After everything has run."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    out, checker = tmp_path_factory.mktemp("shapes"), Checker()
    with pytest.MonkeyPatch.context() as patch, checker:
        patch.chdir(out)
        patch.setattr(train, "FITTED", 64)
        run_the_model(checker, out)
        run_the_judges(checker, out)
        run_the_measures(checker, out)
        encoder.sincos_positions(3, 4, 84)
        built_in.regular_polygon(5, 1.0)
        built_in.render_shape(0, np.random.default_rng(0), 20)
    return checker


# --------------------------------------------------------------------------------------------------
# Tests


def test_no_claimed_shape_is_false(checker):
    assert not checker.errors, "\n".join(sorted(checker.errors.values()))


def test_every_claimed_shape_is_checked(checker):
    missed = checker.source.claims - checker.checked
    assert not missed, "\n".join(sorted(f"{claim.key} of {claim.owners}" for claim in missed))


def test_every_shape_is_made_of_known_symbols(checker):
    for claim in (*checker.source.claims, *checker.source.text):
        unknown = {s for d in dimensions(claim.shape) for s in symbols(d)} - {*SYMBOLS}
        assert not unknown or claim.key in STATED_AGAIN, f"{claim.key}: {unknown}, a shape?"


def test_shapes_in_other_text_repeat_one_that_is_checked(checker):
    """One of the thing of the same name, else one of the module; scripts tell of all modules."""
    known = defaultdict(set)
    for claim in checker.checked:
        module, *_, function = claim.where.split(".")
        names = {"", claim.word, *claim.owners, *([function] if "result" in claim.owners else [])}
        scripts = [(script, "") for script in ("train", "sample", "evaluate")]
        for place in [*scripts, *((module, name) for name in names)]:
            known[place].add(claim.shape.replace(" ", ""))
    false = []
    for claim in (claim for claim in checker.source.text if claim.key not in STATED_AGAIN):
        module, shape = claim.where.split(".")[0], claim.shape.replace(" ", "")
        name = claim.word if len(claim.word) > 2 else ""  # x, z, mu are many things
        same = known.get((module, name), known[module, ""])
        if not {shape, f"(B,{shape[1:]}"} & same:
            false.append(f"{claim.key} of {claim.word or 'nothing'}")
    assert not false, "\n".join(false)


def test_shapes_that_nothing_here_can_see_are_as_told():
    cache = flow.KeyValueCache(2, 5)
    cache.append(1, torch.zeros(2, 3, 7, 4, 11))
    assert cache.buffer.shape == (2, 2, 3, 7, 5, 11)
    config = small_config(batch_size=3)
    model = train.MIMFlow(config)
    training = train.JointTraining(model, losses.FrozenNetworks(None, {}))
    draws = train.draw_randomness(config, 0, CPU)
    loss, logs, _ = training(torch.zeros(3, 3, 24, 24), torch.arange(3), draws, 1.0)
    assert logs.pop("block_mean_square").shape == (2,)
    assert {x.shape for x in (loss, *logs.values())} == {()}


def test_the_tables_of_exceptions_name_only_what_there_is(checker):
    assert STATED_AGAIN.keys() <= {claim.key for claim in checker.source.text}
    text = normal(" ".join(path.read_text() for path in FILES.values()))
    assert not [shape for shape in NOT_SHAPES if shape not in text]
    assert {function for function, _ in MEANT} <= {claim.where for claim in checker.source.claims}
