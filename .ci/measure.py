"""Print how large and how dense the code is, so that growth is seen: python .ci/measure.py

Per module: lines, code lines, share of comment lines, tokens (Python's tokenizer, without comments and
docstrings), tokens a code line, dense forms per 100 code lines (conditional expressions, comprehensions,
lambdas, walruses, several targets packed into one assignment), the longest function, and the share of hinted
arguments of public functions. Then the number of options of every program, and the lines and words of the
README.
"""

import ast
import io
import sys
import tokenize
from dataclasses import fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

LAYOUT = {
    tokenize.NEWLINE,
    tokenize.NL,
    tokenize.COMMENT,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
    tokenize.ENCODING,
}
DENSE = (ast.IfExp, ast.ListComp, ast.DictComp, ast.SetComp, ast.GeneratorExp, ast.Lambda, ast.NamedExpr)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)


def docstring_lines(tree):
    """Numbers of the lines that belong to docstrings."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            found.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return found


def count_dense(tree):
    """Expressions that say several things at once."""
    count = 0
    for node in ast.walk(tree):
        packed = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple)
        if isinstance(node, DENSE) or (packed and isinstance(node.value, ast.Tuple)):
            count += 1
    return count


def measure(path):
    """The figures of one file, as a dict."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    lines = source.splitlines()
    documentation = docstring_lines(tree)
    comments = set()
    code = set()
    tokens = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments.add(token.start[0])
        elif token.type not in LAYOUT and token.start[0] not in documentation:
            tokens += 1
            code.update(range(token.start[0], token.end[0] + 1))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    longest = max(functions, key=lambda f: f.end_lineno - f.lineno, default=None)
    arguments = []
    for function in functions:
        if not function.name.startswith("_"):
            named = function.args.args + function.args.kwonlyargs
            arguments += [argument for argument in named if argument.arg not in ("self", "cls")]
    return {
        "lines": len(lines),
        "code": len(code),
        "comments": len(comments),
        "tokens": tokens,
        "dense": count_dense(tree),
        "longest": longest.end_lineno - longest.lineno + 1 if longest else 0,
        "name": longest.name if longest else "-",
        "arguments": len(arguments),
        "hinted": sum(argument.annotation is not None for argument in arguments),
    }


def show(name, m):
    """One row of the table."""
    code = max(1, m["code"])
    hints = m["hinted"] / max(1, m["arguments"])
    comments = m["comments"] / max(1, m["lines"])
    per_line = m["tokens"] / code
    dense = 100 * m["dense"] / code
    print(
        f"{name:22} {m['lines']:6} {m['code']:6} {comments:9.1%} {m['tokens']:7} {per_line:8.1f} "
        f"{dense:6.1f} {m['longest']:5} {m['name']:20} {hints:5.0%}"
    )


def options(config):
    """How many fields of a config can be typed on the command line."""
    return sum(bool(field.metadata["help"]) for field in fields(config))


def main():
    print(
        f"{'file':22} {'lines':>6} {'code':>6} {'comments':>9} {'tokens':>7} {'tok/line':>8} {'dense':>6} "
        "longest function"
    )
    total = {}
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("extras/*.py"), *ROOT.glob("benchmarks/*.py")]):
        m = measure(path)
        show(str(path.relative_to(ROOT)), m)
        for key, value in m.items():
            if key == "longest" and value > total.get(key, 0):
                total |= {"longest": value, "name": m["name"]}
            elif key not in ("longest", "name"):
                total[key] = total.get(key, 0) + value
    show("all", total)

    import prepare
    import rl
    import sample
    import train

    configs = {
        "train": train.TrainConfig,
        "rl": rl.RLConfig,
        "sample": sample.SampleConfig,
        "prepare": prepare.PrepareConfig,
    }
    print("options: " + ", ".join(f"{name} {options(config)}" for name, config in configs.items()))
    for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]:
        text = path.read_text(encoding="utf-8")
        print(f"{path.relative_to(ROOT)}: {len(text.splitlines())} lines, {len(text.split())} words")


if __name__ == "__main__":
    main()
