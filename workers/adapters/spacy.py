"""spaCy: ``annotate``. A trained pipeline where there is one, else rules for English (``_spacy_rules``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Final, Self, cast

from pydantic import Field

from cortex_tasks.errors import CortexError, InvalidInput, ModelUnavailable
from cortex_tasks.payloads import AnnotateParams, Params
from workers.adapters._options import Options, read_options
from workers.adapters.base import Adapter, Item, LoadContext, WireValue

__all__ = ["FALLBACK_NOTE", "SpacyAdapter", "load_pipeline"]

FALLBACK_NOTE: Final = (
    "fallback: a blank English pipeline with rule-based entities (no tags, lemmas or parse); "
    "install the model's package (en_core_web_sm) or name a pipeline's directory as 'file:<path>'"
)


class _Options(Options):
    #: Components of the trained pipeline that are not loaded, e.g. ["parser"] for speed.
    exclude: list[str] = Field(default_factory=list)


class SpacyAdapter(Adapter):
    """Options: ``exclude``. Offsets are characters of the submitted text; texts of any script are fine."""

    #: Bump as well when the rules change.
    version = "1"
    weights_optional: ClassVar[bool] = True

    def __init__(self, nlp: Any, size_bytes: int, note: str = "") -> None:
        self._nlp = nlp
        self._size_bytes = size_bytes
        self.note = note

    @classmethod
    def load(cls, context: LoadContext) -> Self:
        """Raises ConfigError for unknown options, ModelUnavailable when the snapshot is no pipeline for this spaCy."""
        options = read_options(_Options, context)
        if context.snapshot is not None:
            nlp = load_pipeline(context.snapshot, options.exclude)
            size_bytes = sum(file.stat().st_size for file in context.snapshot.rglob("*") if file.is_file())
            return cls(nlp, size_bytes)
        try:
            from workers.adapters._spacy_rules import blank_pipeline

            nlp = blank_pipeline()
        except ImportError as error:
            raise _no_library(error) from error
        return cls(nlp, len(nlp.to_bytes()), FALLBACK_NOTE)

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    @property
    def library(self) -> str:
        import spacy

        meta = self._nlp.meta
        trained = "" if self.note else f" ({meta['lang']}_{meta['name']} {meta['version']})"
        return f"spacy {spacy.__version__}{trained}"

    def example(self, task: str) -> tuple[Sequence[Any], Params]:
        return ["Dr. Ada Lovelace paid $5 million to Acme Inc. in London on 10 December 1842."], AnnotateParams()

    def prepare(self, task: str, inputs: Sequence[Any], params: Params) -> list[Item | CortexError]:
        most = self._nlp.max_length
        return [
            Item(text, len(text) // 4 + 1)
            if len(text) <= most
            else InvalidInput(f"a text of {len(text):,} characters is over spaCy's own limit of {most:,}")
            for text in inputs
        ]

    def forward(self, task: str, items: Sequence[Item], params: Params) -> Sequence[WireValue]:
        """Finished wire values: what spaCy made of a batch is freed here, with the words it met on the way.

        Without the memory zone, a long-running process keeps each new word for ever.
        """
        include = cast("AnnotateParams", params).include
        with self._nlp.memory_zone():
            return [_document(doc, include) for doc in self._nlp.pipe(item.data for item in items)]


def load_pipeline(path: Path, exclude: Sequence[str] = ()) -> Any:
    """The ``spacy.Language`` in a directory, or in the one below it (as packages have it).

    A pipeline that does not find sentences gets a ``sentencizer``. Raises ModelUnavailable.
    """
    try:
        import spacy
    except ImportError as error:
        raise _no_library(error) from error
    roots = [path] if (path / "config.cfg").is_file() else [file.parent for file in path.glob("*/config.cfg")]
    if len(roots) != 1:
        raise ModelUnavailable(f"{path} does not hold one spaCy pipeline: {len(roots)} config.cfg found")
    try:
        nlp = spacy.load(roots[0], exclude=list(exclude))
    except Exception as error:
        raise ModelUnavailable(
            f"spaCy {spacy.__version__} cannot load the pipeline in {roots[0]}: {type(error).__name__}: "
            f"{str(error)[:300]}; install a pipeline made for this version"
        ) from error
    if not any("token.is_sent_start" in nlp.get_pipe_meta(name).assigns for name in nlp.pipe_names):
        nlp.add_pipe("sentencizer")
    return nlp


def _no_library(error: ImportError) -> ModelUnavailable:
    return ModelUnavailable(f"spaCy is not installed: {error}; pip install 'datapunk-cortex[spacy]'")


def _document(doc: Any, include: Sequence[str]) -> WireValue:
    value: WireValue = {}
    if "tokens" in include:
        value["tokens"] = [_token(token) for token in doc]
    if "sentences" in include:
        value["sentences"] = [_span(sentence) for sentence in doc.sents]
    if "entities" in include:
        value["entities"] = [{**_span(entity), "label": entity.label_} for entity in doc.ents]
    return value


def _token(token: Any) -> WireValue:
    text = token.text
    return {
        "text": text,
        "start": token.idx,
        "end": token.idx + len(text),
        "lemma": token.lemma_,
        "pos": token.pos_,
        "tag": token.tag_,
        "dep": token.dep_,
    }


def _span(span: Any) -> WireValue:
    return {"text": span.text, "start": span.start_char, "end": span.end_char}
