"""Two hundred bad inputs: every one is one line on standard error and exit code 2, within five seconds.

A line is a command; its values are wrong in the way that its section says. `{w}` is a workspace with a harvest `h` of
two hook points and an indexed SAE `s`; the other names in braces are files and folders that the fixture makes.
"""

import email
import re
import shlex
import shutil
import time
from pathlib import Path

import pytest

from workbench.cli.main import run

HOOK = "blocks.1.hook_resid_post"
SECONDS = 5.0
HARVEST = f"harvest new --model {{model}} --corpus {{texts}} --hook {HOOK} --context 32 --tokens 600 -w {{tmp}}/new"
TRAIN = f"train h --name new --hook {HOOK} --d-sae 64 --k 4 --tokens 2048 --batch-size 512 -w {{w}}"
PATCH = "circuits patch induction --model {model} -n 2 -w {w}"
MEASURE = "sparsity measure new --model {model} --corpus {texts} --tokens 256 --context 32 -w {w}"
BAD = f"""
# commands and options that do not exist
harvets
Info
info --wrkspace {{w}}
info extra -w {{w}}
info --json yes -w {{w}}
circuits find
circuits patch
sparsity everything
train
train h -w {{w}}
{TRAIN} --K 4
{TRAIN} --rule
feature
steer s -w {{w}}
prompt s -w {{w}}
harvest new -w {{w}}
# numbers that are none
{HARVEST} --tokens many
{HARVEST} --context 32.5
{HARVEST} --tokens 1e6
{TRAIN} --k four
{TRAIN} --k 4.5
{TRAIN} --d-sae wide
{TRAIN} --seed x
{TRAIN} --lr fast
{TRAIN} --sparsity much --rule relu
{TRAIN} --batch-size x
evaluate s --tokens x -w {{w}}
index s --rows x -w {{w}}
feature s x -w {{w}}
feature s 1.5 -w {{w}}
prompt s text --token x -w {{w}}
prompt s text --max-density x -w {{w}}
steer s x --prompt text -w {{w}}
steer s 1 --prompt text --strength x -w {{w}}
steer s 1 --prompt text --temperature x -w {{w}}
{PATCH} --prompts x
{PATCH} --seed x
circuits discover induction --model {{model}} --keep x -w {{w}}
{MEASURE} --tokens x
sparsity enforce new --model {{model}} --corpus {{texts}} --p x -w {{w}}
bench demo --rounds x
app --port x -w {{w}}
concepts s --top x -w {{w}}
explain s --model {{model}} --feature x -w {{w}}
# numbers that are not finite
{TRAIN} --lr nan
{TRAIN} --lr inf
{TRAIN} --sparsity nan --rule relu
{TRAIN} --sparsity inf --rule relu
steer s 1 --prompt text --strength nan -w {{w}}
steer s 1 --prompt text --strength inf -w {{w}}
steer s 1 --prompt text --temperature nan -w {{w}}
steer s 1 --prompt text --temperature inf -w {{w}}
prompt s text --max-density nan -w {{w}}
circuits discover induction --model {{model}} --method features --sae s --keep nan -w {{w}}
sparsity enforce new --model {{model}} --corpus {{texts}} --tokens 256 --context 32 --p nan -w {{w}}
# negative numbers and zeros
{HARVEST} --tokens -5
{HARVEST} --tokens 0
{HARVEST} --context -1
{HARVEST} --context 1
{TRAIN} --k 0
{TRAIN} --k -4
{TRAIN} --d-sae 0
{TRAIN} --d-sae -64
{TRAIN} --seed -1
{TRAIN} --lr 0
{TRAIN} --lr -0.1
{TRAIN} --sparsity -1 --rule relu
{TRAIN} --batch-size 0
{TRAIN} --batch-size -512
{TRAIN} --tokens 0
{TRAIN} --tokens -1
evaluate s --tokens 0 -w {{w}}
inference s --k 0 -w {{w}}
codebook h --name new --hook {HOOK} --k 0 -w {{w}}
codebook h --name new --hook {HOOK} --heads 5 -w {{w}}
evaluate s --tokens -9 -w {{w}}
index s --rows 0 -w {{w}}
index s --rows -5 -w {{w}}
feature s -1 -w {{w}}
prompt s text --token -1 -w {{w}}
prompt s text --max-density -1 -w {{w}}
steer s -- -1 --prompt text -w {{w}}
steer s 1 --prompt text --tokens -1 -w {{w}}
steer s 1 --prompt text --temperature -1 -w {{w}}
steer s 1 --prompt text --seed -1 -w {{w}}
{PATCH} --prompts 0
{PATCH} --seed -1
{PATCH} --batch-size 0
{PATCH} --top 0
circuits heads --model {{model}} --rows 0 -w {{w}}
circuits heads --model {{model}} --length 1 -w {{w}}
circuits heads --model {{model}} --needles -1 -w {{w}}
circuits heads --model {{model}} --seed -1 -w {{w}}
circuits discover induction --model {{model}} --method features --sae s --keep -1 -w {{w}}
circuits discover induction --model {{model}} --steps 0 -w {{w}}
{MEASURE} --tokens 0
{MEASURE} --context 0
sparsity attention new --model {{model}} --corpus {{texts}} --tokens 256 --context 32 --budget 0 -w {{w}}
sparsity attention new --model {{model}} --corpus {{texts}} --tokens 256 --context 32 --budget -3 -w {{w}}
sparsity enforce new --model {{model}} --corpus {{texts}} --tokens 256 --context 32 --p -0.5 -w {{w}}
bench demo --rounds 0
bench demo --rounds -3
app --port 0 -w {{w}}
app --port -1 -w {{w}}
concepts s --top 0 -w {{w}}
explain s --model {{model}} --feature -1 -w {{w}}
explain s --model {{model}} --feature 1 --examples 0 -w {{w}}
explain s --model {{model}} --feature 1 --texts -1 -w {{w}}
demo --tokens 0 -w {{tmp}}/new
# huge numbers
{HARVEST} --context 99999999
{HARVEST} --tokens 99999999999999999999999
{TRAIN} --d-sae 99999999999
{TRAIN} --d-sae 99999999999999999999999
{TRAIN} --batch-size 10000000000
{TRAIN} --k 65
{TRAIN} --k 99999999999999999999999
{TRAIN} --seed 99999999999999999999999
{TRAIN} --lr 1e400
{TRAIN} --tokens 99999999999999999999999
feature s 9999 -w {{w}}
feature s 99999999999999999999999 -w {{w}}
prompt s text --token 9999 -w {{w}}
steer s 9999 --prompt text -w {{w}}
steer s 99999999999999999999999 --prompt text -w {{w}}
steer s 1 --prompt text --strength 1e300 -w {{w}}
steer s 1 --prompt text --tokens 99999 -w {{w}}
steer s 1 --prompt text --seed 99999999999999999999999 -w {{w}}
{PATCH} --seed 99999999999999999999999
{PATCH} --prompts 99999999999999999999999
circuits heads --model {{model}} --length 9999 -w {{w}}
{MEASURE} --context 9999
app --port 99999 -w {{w}}
explain s --model {{model}} --feature 9999 -w {{w}}
# names that are not there
info -w {{tmp}}/none
sql "SELECT 1" -w {{tmp}}/none
train none --name new -w {{w}}
{TRAIN} --hook blocks.9.hook_resid_post
{TRAIN} --rule topkk
{TRAIN} --rule ""
evaluate none -w {{w}}
evaluate s none -w {{w}}
inference none -w {{w}}
codebook none --name new -w {{w}}
codebook h --name new --hook blocks.9.hook_mlp_out -w {{w}}
codebook h --name s --hook {HOOK} -w {{w}}
codebook h --name new --hook {HOOK} --codes 99999999 -w {{w}}
compare none -w {{w}}
index none -w {{w}}
index s --harvest none -w {{w}}
feature none 1 -w {{w}}
feature s --list none -w {{w}}
feature s --search "" -w {{w}}
feature s -w {{w}}
feature s --label x -w {{w}}
prompt none text -w {{w}}
prompt s text --by strongest -w {{w}}
prompt s text --token 1 --target "not one token at all" -w {{w}}
prompt s text --target x -w {{w}}
steer none 1 --prompt text -w {{w}}
steer s 1 --prompt text --kind turn -w {{w}}
steer s 1 --prompt text --where here -w {{w}}
concepts none -w {{w}}
concepts s --harvest none -w {{w}}
concepts s --language french -w {{w}}
inference s --method lars -w {{w}}
explain none --model {{model}} --feature 1 -w {{w}}
explain s --model {{model}} -w {{w}}
explain s --model {{model}} --feature 1 --all -w {{w}}
explain s --model {{tmp}}/none --feature 1 -w {{w}}
explain s --model {{model}} --list none -w {{w}}
gc --sae none -w {{w}}
gc --harvest none -w {{w}}
gc --run none -w {{w}}
export none {{tmp}}/out -w {{w}}
export s {{tmp}}/out --format pickle -w {{w}}
circuits patch inductoin --model {{model}} -w {{w}}
{PATCH} --site heads
{PATCH} --direction both
{PATCH} --metric loss
{PATCH} --to a9.h0<q>
circuits ablate induction --model {{model}} --kind half -w {{w}}
circuits discover induction --model {{model}} --method guess -w {{w}}
circuits discover induction --model {{model}} --method features --sae none -w {{w}}
circuits dfa none --text text --model {{model}} -w {{w}}
circuits dfa s --text text --model {{model}} -w {{w}}
circuits table sva --model gpt2 -w {{w}}
sparsity sae new none --model {{model}} -w {{w}}
sparsity compare none -w {{w}}
sparsity enforce new --method prune --model {{model}} -w {{w}}
bench XXL
harvest new --model {{model}} --corpus {{texts}} --hook blocks.1.hook_resid_past --context 32 -w {{tmp}}/new
harvest new --model {{model}} --corpus {{texts}} --hook blocks.9.hook_resid_post --context 32 -w {{tmp}}/new
harvest new --model {{model}} --corpus {{texts}} --hook "" --context 32 -w {{tmp}}/new
{HARVEST} --split test
{HARVEST} --dtype int8
{HARVEST} --model-dtype int8
# names that cannot be files
harvest ../x --model {{model}} --corpus {{texts}} --hook {HOOK} --context 32 -w {{tmp}}/new
harvest "" --model {{model}} --corpus {{texts}} --hook {HOOK} --context 32 -w {{tmp}}/new
train h --name ../x --hook {HOOK} -w {{w}}
train h --name "a b/c" --hook {HOOK} -w {{w}}
evaluate ../s -w {{w}}
feature ../s 1 -w {{w}}
sparsity measure ../x --model {{model}} --corpus {{texts}} --tokens 256 --context 32 -w {{w}}
{PATCH} --name ../x
import {{saelens}} --name ../x -w {{w}}
# names that can be none on the hub
harvest new --model none/ --corpus {{texts}} --hook {HOOK} --context 32 -w {{tmp}}/new
harvest new --model "my model" --corpus {{texts}} --hook {HOOK} --context 32 -w {{tmp}}/new
harvest new --model {{model}} --corpus none/ --hook {HOOK} --context 32 -w {{tmp}}/new
explain s --model none/ --feature 1 -w {{w}}
circuits heads --model none/ -w {{w}}
sparsity measure new --model {{model}} --corpus none/ -w {{w}}
# files that are not there, foreign or damaged
info -w {{texts}}
info -w {{binary}}
harvest new --model {{tmp}}/none --corpus {{texts}} --hook {HOOK} -w {{tmp}}/new
harvest new --model {{texts}} --corpus {{texts}} --hook {HOOK} -w {{tmp}}/new
harvest new --model {{binary}} --corpus {{texts}} --hook {HOOK} -w {{tmp}}/new
harvest new --model {{model}} --corpus {{tmp}}/none --hook {HOOK} --context 32 -w {{tmp}}/new
harvest new --model {{model}} --corpus {{binary}} --hook {HOOK} --context 32 -w {{tmp}}/new
harvest new --model {{model}} --corpus {{nothing}} --hook {HOOK} --context 32 -w {{tmp}}/new
harvest new --model {{model}} --corpus {{jsonl}} --hook {HOOK} --context 32 -w {{tmp}}/new
harvest new --model {{model}} --corpus {{folder}} --hook {HOOK} --context 32 -w {{tmp}}/new
harvest new --model {{model}} --corpus {{texts}} --hook {HOOK} --context 32 -w {{binary}}
train h --name new --hook {HOOK} --sweep {{tmp}}/none.toml -w {{w}}
train h --name new --hook {HOOK} --sweep {{binary}} -w {{w}}
train h --name new --hook {HOOK} --sweep {{jsonl}} -w {{w}}
train h --name new --hook {HOOK} --sweep {{folder}} -w {{w}}
train h --name new --hook {HOOK} --sweep {{toml}} -w {{w}}
import {{tmp}}/none --name new -w {{w}}
import {{folder}} --name new -w {{w}}
import {{binary}} --name new -w {{w}}
import {{model}} --name new -w {{w}}
import --name new -w {{w}}
import {{saelens}} --name s -w {{w}}
export s {{texts}} -w {{w}}
export s {{binary}}/x -w {{w}}
concepts s --table {{tmp}}/none.csv -w {{w}}
concepts s --table {{binary}} -w {{w}}
concepts s --table {{jsonl}} -w {{w}}
circuits patch {{tmp}}/none.jsonl --model {{model}} -w {{w}}
circuits patch {{jsonl}} --model {{model}} -w {{w}}
circuits patch {{folder}} --model {{model}} -w {{w}}
feature s 1 --html {{tmp}}/none/page.html -w {{w}}
feature s --table {{tmp}}/none/table.parquet -w {{w}}
compare s --html {{folder}} -w {{w}}
evaluate s --corpus {{tmp}}/none -w {{w}}
evaluate s --corpus {{binary}} -w {{w}}
sparsity measure new --model {{tmp}}/none -w {{w}}
sparsity measure new --model {{model}} --corpus {{nothing}} -w {{w}}
# SQL
sql "" -w {{w}}
sql "SELEC 1" -w {{w}}
sql "SELECT * FROM none" -w {{w}}
sql "SELECT none FROM tokens" -w {{w}}
sql "SELECT 1; SELECT 2" -w {{w}}
sql "CREATE TABLE t (a INT)" -w {{w}}
sql "COPY tokens TO '{{tmp}}/stolen.csv'" -w {{w}}
sql "SELECT * FROM read_text('{{binary}}')" -w {{w}}
sql "ATTACH '{{tmp}}/x.duckdb'" -w {{w}}
sql "SELECT vec('none', 1)" -w {{w}}
sql "SELECT 1" --harvest none -w {{w}}
sql "SELECT now()" -w {{w}}
sql "SELECT 1/'a'" -w {{w}}
"""
CASES = [line for line in BAD.splitlines() if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, tiny_gpt2: Path) -> dict[str, str]:
    """What the cases name."""
    root = tmp_path_factory.mktemp("bad")
    texts, folder = root / "texts", root / "folder"
    texts.mkdir()
    folder.mkdir()
    pieces: list[str] = []
    for file in sorted(Path(email.__file__).parent.glob("*.py")):
        pieces += file.read_text(encoding="utf-8").split("\n\n\n")
    for number, piece in enumerate([piece for piece in pieces if len(piece) > 400][:30]):
        (texts / f"{number:02}.txt").write_text(piece, encoding="utf-8")
    (root / "binary").write_bytes(bytes(range(256)) * 8)
    (root / "nothing.txt").write_bytes(b"")
    (root / "lines.jsonl").write_text('{"text": 3}\n{"broken"\n')
    (root / "sweep.toml").write_text('d_sae = "wide"\n[[rule]]\nname = "topk"\nk = 4\n')
    w, common = str(root / "w"), ["--device", "cpu"]
    harvest = ["harvest", "h", "--model", str(tiny_gpt2), "--corpus", str(texts), "--hook", HOOK]
    two_hooks = ["--hook", "blocks.0.attn.hook_z", "--tokens", "6000", "--context", "32"]
    assert run([*harvest, *two_hooks, "-w", w, *common]) == 0
    train = ["train", "h", "--name", "s", "--hook", HOOK, "--k", "4", "--d-sae", "64", "--tokens", "4096"]
    assert run([*train, "--batch-size", "512", "-w", w, *common]) == 0
    assert run(["index", "s", "-w", w, *common]) == 0
    assert run(["export", "s", str(root / "saelens"), "-w", w]) == 0
    return {
        "w": w, "model": str(tiny_gpt2), "texts": str(texts), "folder": str(folder), "tmp": str(root),
        "binary": str(root / "binary"), "nothing": str(root / "nothing.txt"), "jsonl": str(root / "lines.jsonl"),
        "toml": str(root / "sweep.toml"), "saelens": str(root / "saelens"),
    }  # fmt: skip


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_there_are_two_hundred() -> None:
    assert len(set(CASES)) >= 200


@pytest.mark.parametrize("case", CASES)
def test_a_bad_input_is_one_line(case: str, places: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(Path(places["w"]))
    capsys.readouterr()
    start = time.process_time()
    code = run(shlex.split(case.format(**places)))
    seconds = time.process_time() - start
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if not re.match(r"[\w -]+: +\d+%", line)]
    assert code == 2, said.out[-300:]
    assert len(lines) == 1, lines
    assert lines[0].startswith("workbench: error: ")
    assert len(lines[0]) < 400
    assert seconds < SECONDS
    assert tree(Path(places["w"])) == before, "something was left behind"


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("feature s -5", "-5 reads as an option, and there is none: features and positions are numbered from 0"),
        ("search return", "No such command 'search': `workbench feature --search TEXT` does that here"),
        ("trian h", "No such command 'trian'. Did you mean 'train'?"),
        ("feature s five", "'number': 'five' is no whole number, in digits alone"),
        ("train h --name x --tokens 1M", "'--tokens': '1M' is no whole number, in digits alone"),
        (
            "train h --name x --k 16,32",
            "'16,32' is no whole number, in digits alone, and for several the option is repeated",
        ),
        ("steer s 1 --prompt x --strength much", "'--strength': 'much' is no number"),
        ("evaluate s --tokens 1", "'--tokens': 1 is not at least 2"),
        ("app --port 99999", "'--port': 99999 is not at most 65,535"),
    ],
)
def test_the_line_says_what_was_expected(case: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run(shlex.split(case)) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("hook", "said"),
    [("blocks.9.hook_resid_post", "layer 9 does not exist"), ("blocks.*.resid_post", "unknown hook point")],
)
@pytest.mark.parametrize("command", ["harvest new", "harvest new --estimate-only", "train --name new"])
def test_a_hook_point_there_is_not_is_told_before_weights_are_read(
    command: str, hook: str, said: str, places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a model that has a description and nothing else."""
    shutil.copy(Path(places["model"]) / "config.json", tmp_path)
    capsys.readouterr()
    asked = ["--model", str(tmp_path), "--corpus", places["texts"], "--hook", hook, "-w", str(tmp_path / "w")]
    if "train" in command and "*" in hook:
        asked += ["--target-hook", "blocks.*.hook_mlp_out"]
    assert run([*command.split(), *asked]) == 2
    assert said in capsys.readouterr().err
