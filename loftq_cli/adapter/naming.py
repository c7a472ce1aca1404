"""Names of a base as an adapter spells the names: another class of the model, or another place in a larger model."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

from loftq_cli.adapter.fused import all_parts
from loftq_cli.model.targets import module_of

# The output layer over the vocabulary: a tied head has no tensor in the files.
VOCABULARY_HEAD = re.compile(r"(?:^|\.)(?:lm_head|lm_head\.decoder|embed_out|cls\.predictions\.decoder)$")
# Parts of names of the models beside the text model of a larger model.
_NOT_TEXT = re.compile(r"(?:^|[._])(?:vision|visual|image|audio|speech|video|encoder_projector)")
_MAX_PARTS = 3  # leading parts of names that two places of a model may differ in


def spelled_names(names: Mapping[str, str], adapted: Collection[str]) -> dict[str, str]:
    """Map each tensor name in the files of a base to the name in an adapter's spelling.

    names     name in the files -> name in the loaded model
    adapted   names of the adapted modules, in the adapter's spelling

    An adapter trained through a different class of the model (the "LlamaModel" in a "LlamaForCausalLM") has a leading
    part more or less in all names. An adapter of an older transformers may have the names of the files. An adapter of a
    text model fits the text model inside a vision-language model, and the reverse.

    >>> spelled_names({"q.weight": "model.layers.q.weight"}, ["layers.q"])
    {'q.weight': 'layers.q.weight'}
    """
    modules = {module_of(loaded) for loaded in names.values()}
    known = modules | all_parts(modules)
    # A head has equal names in most classes, and says nothing about the place of the layers.
    wanted = {module for module in adapted if not VOCABULARY_HEAD.search(module)} or set(adapted)
    if wanted <= known:
        return dict(names)
    in_files = {module_of(name) for name in names}
    if wanted <= in_files | all_parts(in_files):
        return {name: name for name in names}
    if wanted & known:
        return dict(names)
    for prefix in {f"{module.partition('.')[0]}." for module in wanted}:
        if all(module.removeprefix(prefix) in known for module in wanted):
            return {name: prefix + loaded for name, loaded in names.items()}
    for prefix in sorted({f"{module.partition('.')[0]}." for module in modules}):
        if all(prefix + module in known for module in wanted):
            return {name: loaded.removeprefix(prefix) for name, loaded in names.items()}
    place = find_place(known, wanted)
    return dict(names) if place is None else _move(names, *place)


def find_place(known: Collection[str], wanted: Collection[str]) -> tuple[str, str] | None:
    """The starts of names in the adapter and in the base that stand for one place: all adapted modules are in the base
    after the start is exchanged. None unless exactly one place fits; a place outside of vision and audio wins.

    known    names of the base's modules
    wanted   names of the adapted modules

    >>> find_place({"model.language_model.layers.0.q", "model.visual.blocks.0.q"}, {"model.layers.0.q"})
    ('model.', 'model.language_model.')
    """
    found = set[tuple[str, str]]()
    for start, rest in _starts(min(wanted)):
        if not all(module.startswith(start) for module in wanted):
            break
        ends = [module.removeprefix(start) for module in wanted]
        for module in known:
            if module.endswith(f".{rest}") or module == rest:
                other = module.removesuffix(rest)
                if other.count(".") <= _MAX_PARTS and all(other + end in known for end in ends):
                    found.add((start, other))
        if found:
            break
    texts = {place for place in found if not _NOT_TEXT.search(place[1])}
    places = texts or found
    return next(iter(places)) if len(places) == 1 else None


def _starts(module: str) -> Iterator[tuple[str, str]]:
    """Yield the splits of a name after no part, the first part, and so on."""
    parts = module.split(".")
    for count in range(min(_MAX_PARTS, len(parts) - 1) + 1):
        start = ".".join(parts[:count])
        yield (f"{start}." if start else ""), ".".join(parts[count:])


def _move(names: Mapping[str, str], start: str, other: str) -> dict[str, str]:
    """The spelling with `start` in place of `other`. A name outside of the place that would collide gets a mark, so
    that no tensor of the adapter finds the name.
    """
    moved = {name: start + loaded[len(other) :] for name, loaded in names.items() if loaded.startswith(other)}
    taken = set(moved.values())
    kept = {
        name: loaded if loaded not in taken else f"\0{loaded}" for name, loaded in names.items() if name not in moved
    }
    return {name: moved.get(name) or kept[name] for name in names}
