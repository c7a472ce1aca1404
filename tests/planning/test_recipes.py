"""Defaults < preset or TOML < flags; every mistake in a recipe is named, with its file and the nearest right word."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from loftq_cli.checkpoint.patterns import finds
from loftq_cli.conversion.prepare import prepare_conversion
from loftq_cli.errors import InputError, UsageError
from loftq_cli.methods.method import METHODS, Fitting
from loftq_cli.planning.recipe import AffineOptions, CodebookOptions, Override
from loftq_cli.planning.recipe_files import MAX_RECIPE_NBYTES, presets, recipe_toml, resolve_recipe
from loftq_cli.planning.settle import make_recipe
from loftq_cli.planning.sizes import parse_size
from loftq_cli.quant.formats import FORMATS


def recipe_file(tmp_path, text):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return str(path)


def test_flags_override_the_file_and_the_file_overrides_defaults(tmp_path):
    source = recipe_file(tmp_path, 'rank = 8\nmethod = "qlora"\nblock_size = 128\n')
    recipe = resolve_recipe(source, {"rank": 4, "alpha": None})
    assert (recipe.rank, recipe.method, recipe.quant.block_size) == (4, "qlora", 128)


def test_what_a_file_says_of_its_fit_goes_with_the_fit(tmp_path):
    """How often, and from where: what is right for one fit, or without statistics, is not for another, or with them."""
    paper = resolve_recipe("loftq-nf4", {"fit": "loftq"})
    assert (paper.fitting, paper.scales) == (Fitting(fit="loftq", start="zero", iterations=8), "absmax")
    calibrated = resolve_recipe("loftq-nf4", {"calibration": "STATS"})
    assert calibrated == make_recipe(calibration="STATS")
    assert resolve_recipe("loftq-paper", {"calibration": "STATS"}).fitting.fit == "loftq"
    assert resolve_recipe("loftq-nf4", {"method": "qlora"}) == make_recipe(method="qlora")
    source = recipe_file(tmp_path, 'fit = "joint"\nrounds = 3\n')
    assert resolve_recipe(source, {"rank": 4}).fitting.rounds == 3


def test_a_share_of_the_base_goes_with_a_start_of_its_own(tmp_path):
    """A principal start is for a base that nobody runs alone; one alternation is all where the base alone counts."""
    for keep_base in (0.5, 1.0):
        assert resolve_recipe("loftq-nf4", {"keep_base": keep_base}) == make_recipe(keep_base=keep_base)
        saved = recipe_file(tmp_path, recipe_toml(make_recipe(keep_base=keep_base)))
        assert resolve_recipe(saved, {}) == make_recipe(keep_base=keep_base)
        assert resolve_recipe(saved, {"method": "qlora"}) == make_recipe(method="qlora")
        assert resolve_recipe(saved, {"keep_base": 0.0}).fitting.keep_base == 0.0
    paper = resolve_recipe("loftq-paper", {"keep_base": 0.5}).fitting
    assert (paper.iterations, paper.svd, paper.keep_base) == (5, "exact", 0.5)
    source = recipe_file(tmp_path, 'keep_base = 0.5\nstart = "principal"\niterations = 3\n')
    assert resolve_recipe(source, {"rank": 4}).fitting.start == "principal"
    assert resolve_recipe(source, {"keep_base": 0.5}).fitting.start == "principal"


@pytest.mark.parametrize("keep_base", [-0.01, 1.01, float("nan"), float("inf")])
def test_a_share_below_nothing_or_above_everything_is_refused(keep_base):
    with pytest.raises(UsageError, match="keep_base must be from 0 to 1"):
        make_recipe(keep_base=keep_base)


def test_the_default_preset_is_the_default():
    assert resolve_recipe("loftq-nf4", {}) == make_recipe()


@pytest.mark.parametrize("name", presets())
def test_a_saved_recipe_reads_back_to_an_equal_one(name, tmp_path):
    recipe = resolve_recipe(name, {"include": (r"mlp\.", 'a"b\\w'), "alpha": 2.5})
    assert resolve_recipe(recipe_file(tmp_path, recipe_toml(recipe)), {}) == recipe


def test_overrides_read_back_too(tmp_path):
    recipe = make_recipe(override=(Override(match=r"mlp\.", rank=4), Override(match="x", quantize=False, alpha=1.5)))
    assert resolve_recipe(recipe_file(tmp_path, recipe_toml(recipe)), {}) == recipe


def test_dashes_are_as_good_as_underscores(tmp_path):
    assert resolve_recipe(recipe_file(tmp_path, "block-size = 32\n"), {}).quant.block_size == 32


def test_a_whole_number_is_a_number(tmp_path):
    assert resolve_recipe(recipe_file(tmp_path, "alpha = 8\n"), {}).alpha == 8.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ranks = 8", r"recipe.toml: unknown key ranks \(did you mean rank\?\)"),
        ("rank = '8'", "rank must be a whole number, not '8'"),
        ("rank = true", "rank must be a whole number, not True"),
        ("rslora = 1", "rslora must be true or false"),
        ("rank = 0", "rank must be at least 1"),
        ("iterations = 0", "iterations must be at least 1"),
        ("seed = -1", "seed must be at least 0"),
        ("alpha = 0.0", "alpha must be a positive number"),
        ("alpha = inf", "alpha must be a positive number"),
        ("alpha = nan", "alpha must be a positive number"),
        ("method = 'lofq'", rf"method 'lofq' does not exist \(one of {', '.join(METHODS)}\)"),
        ("quant_type = 'int5'", "quant_type 'int5' does not exist"),
        ("layout = 'gguf'", "layout 'gguf' does not exist"),
        ("adapter_dtype = 'int8'", "adapter_dtype 'int8' does not exist"),
        ("svd = 'quick'", "svd 'quick' does not exist"),
        ("block_size = 48", r"block_size 48 does not exist for nf4 \(one of 32, 64,"),
        ("include = 'mlp'", "include must be a list of strings"),
        ("include = ['(']", "is not a regular expression that is read here: "),
        ("max_shard_size = '5 parsecs'", "is not a size"),
        ("max_shard_size = '10KB'", "less than 1 MB"),
        ("override = 3", "override must be a list of tables"),
        ("[[override]]\nrank = 3", "has no match"),
        ("[[override]]\nmatch = 'a'\nrnk = 3", "unknown key rnk"),
        ("[[override]]\nmatch = '('", "match '\\('"),
        ("[[override]]\nmatch = 'a'\nblock_size = 7", "block_size 7"),
        ("[[override]]\nmatch = 'a'\nrank = 0", "rank must be at least 1"),
        ("rank = ", "not valid TOML"),
        ("\x00", "not valid TOML"),
        (f"rank = {'9' * 5000}", "not valid TOML"),
        (f"seed = {'9' * 30}", "seed is a number of more than 64 bits"),
        (f"alpha = {'9' * 400}", "alpha is a number of more than 64 bits"),
        (f"method = 0x{'F' * 5000}", "method is a number of more than 64 bits"),
        (f"rank = {'[' * 200}{']' * 200}", "rank must be a whole number, not \\[\\[\\["),
        (f"max_shard_size = '{'9' * 400}GB'", "is larger than any disk"),
        ("include = ['a{99999999999}']", "is not a regular expression that is read here: "),
    ],
)
def test_every_mistake_is_named(tmp_path, text, message):
    with pytest.raises(UsageError, match=message):
        resolve_recipe(recipe_file(tmp_path, text), {})


def test_a_flag_that_changes_the_format_takes_along_what_the_file_says_of_the_old_one(tmp_path):
    override = '[[override]]\nmatch = "mlp"\nrank = 4\nblock_size = 32\n'
    text = 'rank = 8\nblock_size = 128\ndouble_quant = false\nlayout = "bitsandbytes"\n' + override
    recipe = resolve_recipe(recipe_file(tmp_path, text), {"quant_type": "int4"})
    assert recipe.override == (Override(match="mlp", rank=4),)
    assert recipe.quant == AffineOptions("int4", 64, symmetric=False, scale_dtype=None)
    assert (recipe.rank, recipe.layout) == (8, "compressed-tensors")
    back = resolve_recipe("qalora-int4", {"quant_type": "nf4", "method": "loftq"})
    assert back.quant == CodebookOptions("nf4", 64, double_quant=True)
    assert (back.pooling, back.init, back.layout) == (None, None, "bitsandbytes")
    # Without such a flag, a file that contradicts itself is refused.
    with pytest.raises(UsageError, match="block_size means nothing with quant_type int4"):
        resolve_recipe(recipe_file(tmp_path, 'quant_type = "int4"\nblock_size = 128\n'), {})


@pytest.mark.parametrize("name", sorted(presets()))
@pytest.mark.parametrize("quant_type", sorted(FORMATS))
def test_every_preset_takes_another_format(name, quant_type):
    recipe = resolve_recipe(name, {"quant_type": quant_type, "method": "loftq"})
    assert (recipe.quant_type, recipe.rank) == (quant_type, resolve_recipe(name, {}).rank)


def test_an_unknown_recipe_lists_the_presets():
    with pytest.raises(UsageError, match=r"no recipe 'gone' \(a TOML file, or one of the presets .*loftq-nf4"):
        resolve_recipe("gone", {})


def test_a_folder_is_no_recipe(tmp_path):
    with pytest.raises(InputError, match="is not a regular file"):
        resolve_recipe(str(tmp_path), {})


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("5GB", 5 * 10**9), ("500 MB", 5 * 10**8), ("1GiB", 2**30), ("1.5gb", 15 * 10**8), ("1000000", 10**6)],
)
def test_sizes_are_read_as_people_write_them(text, nbytes):
    assert parse_size(text) == nbytes


# What is read whole, and what is searched for, is bounded.


def test_a_pipe_is_no_recipe_and_nobody_waits_for_it(tmp_path):
    os.mkfifo(tmp_path / "recipe.toml")
    with pytest.raises(InputError, match=r"recipe.toml: is not a regular file \(give a file, not a folder, a pipe or"):
        resolve_recipe(str(tmp_path / "recipe.toml"), {})


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/full", "/dev/stdin"])
def test_a_device_is_no_recipe(device):
    if Path(device).is_file():
        pytest.skip("standard input is a file here")
    with pytest.raises(InputError, match="is not a regular file"):
        resolve_recipe(device, {})


def test_a_recipe_has_at_most_a_million_bytes(tmp_path):
    text = "rank = 4\n#".ljust(MAX_RECIPE_NBYTES, "x")
    assert resolve_recipe(recipe_file(tmp_path, text), {}).rank == 4
    with pytest.raises(InputError, match="is larger than the 1000000 bytes allowed here"):
        resolve_recipe(recipe_file(tmp_path, f"{text}x"), {})


def test_a_sparse_terabyte_is_no_recipe(tmp_path):
    with (tmp_path / "recipe.toml").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(InputError, match="is larger than"):
        resolve_recipe(str(tmp_path / "recipe.toml"), {})


EXPLODING = "(.|..)*[XYZ]"  # 2**n ways through n characters without an end


@pytest.mark.parametrize(
    "options",
    [{"include": (EXPLODING,)}, {"exclude": (EXPLODING,)}, {"override": (Override(match=EXPLODING, rank=2),)}],
    ids=["include", "exclude", "override"],
)
def test_an_expression_that_explodes_is_refused_by_its_text(options):
    with pytest.raises(
        UsageError, match=r"'\(\.\|\.\.\)\*\[XYZ\]' is a regular expression that takes too long to match"
    ):
        prepare_conversion("builtin:tiny-llama", Path("out"), make_recipe(**options))


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("(?i)[\u0000-\U0010ffff]" * 1000, "no regular expression in the syntax that is read here"),
        ("(?:(?:x{900}){900}){900}", "takes too long to match"),
        ("(" + "a|" * 50_000 + ")", "a regular expression of 100002 characters"),
        ("[", "no regular expression in the syntax that is read here"),
        (")", "unbalanced parenthesis at position 0"),
    ],
    ids=["ranges of Unicode", "counts of counts", "length", "open set", "parenthesis"],
)
def test_an_expression_that_takes_for_ever_to_compile_is_refused_before(expression, reason):
    with pytest.raises(UsageError, match=f"is not a regular expression that is read here: .*{re.escape(reason)}"):
        make_recipe(include=(expression,))


def test_expressions_of_real_recipes_find_what_the_standard_library_finds():
    expressions = [
        *(r"q_proj", r"^model\.layers\.0\.", r"\.(?:0|3)\..*(?:up|down)_proj$", r"layers\.[12]\.", r"mlp|attn"),
        *(r"(?i)SELF_ATTN", r"(?<!k)_proj$", r"layers\.\d+\.mlp", r"(?=.*q)(?=.*0)", "", "$", r"x{0,3}_proj"),
    ]
    modules = [f"model.layers.{i}.self_attn.{x}_proj" for i in range(12) for x in "qkvo"]
    modules += [f"model.layers.{i}.mlp.{x}_proj" for i in range(12) for x in ("up", "down", "gate")]
    for expression in expressions:
        assert [finds(expression, m) for m in modules] == [bool(re.search(expression, m)) for m in modules], expression


def test_the_time_of_an_expression_grows_with_its_searches():
    """A hundred thousand searches of a harmless expression are no reason to refuse it."""
    assert sum(finds(r"layers\.(?:1|2)\..*_proj$", f"layers.{i}.q_proj") for i in range(100_000)) == 2


def test_an_expression_that_explodes_in_the_standard_library_alone_is_simply_answered():
    with pytest.raises(UsageError, match="finds no linear weight"):
        prepare_conversion("builtin:tiny-llama", Path("out"), make_recipe(include=("(([a-z._0-9]+)+)+!",)))
