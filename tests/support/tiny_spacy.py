"""A trained spaCy pipeline, built from a seed in seconds: it knows next to nothing, but all its parts are real."""

from __future__ import annotations

from pathlib import Path

__all__ = ["tagger_and_ner"]

_SENTENCES = (
    ("Ada likes London", ["PROPN", "VERB", "PROPN"], ["B-PERSON", "O", "B-GPE"]),
    ("Bob sold Acme Corp", ["PROPN", "VERB", "PROPN", "PROPN"], ["B-PERSON", "O", "B-ORG", "I-ORG"]),
    ("Rain fell in Paris", ["NOUN", "VERB", "ADP", "PROPN"], ["O", "O", "O", "B-GPE"]),
)


def tagger_and_ner(directory: Path) -> Path:
    """``tok2vec``, ``tagger`` and ``ner`` after a few updates, saved as spaCy saves them; no sentence boundaries."""
    import spacy
    from spacy.tokens import Doc
    from spacy.training import Example

    spacy.util.fix_random_seed(0)
    nlp = spacy.blank("en")
    width = {"model": {"@architectures": "spacy.Tok2VecListener.v1", "width": 96}}
    nlp.add_pipe("tok2vec")
    nlp.add_pipe("tagger", config={"model": {"@architectures": "spacy.Tagger.v2", "tok2vec": width["model"]}})
    nlp.add_pipe("ner")
    examples = []
    for text, tags, entities in _SENTENCES:
        words = text.split()
        examples.append(Example(Doc(nlp.vocab, words=words), Doc(nlp.vocab, words=words, tags=tags, ents=entities)))
    optimizer = nlp.initialize(lambda: examples)
    for _ in range(20):
        nlp.update(examples, sgd=optimizer)
    nlp.meta["name"] = "tiny"
    directory.mkdir(parents=True, exist_ok=True)
    nlp.to_disk(directory)
    return directory
