"""Forms of an embedding made from one vector."""

from __future__ import annotations

import itertools
import math
import struct
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex_tasks.derived import Form, form_of, made, refusal
from cortex_tasks.errors import InvalidParameter
from cortex_tasks.keys import stored_params
from cortex_tasks.payloads import ClassifyParams, Embedding, EmbedParams, Encoding, Timings

SCALED = Form(normalize=True, raw=True, dimensions=None, encoding="float32")


def packed(values: list[float]) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def value(data: bytes, truncated: bool = False) -> dict[str, Any]:
    return {"data": data, "truncated": truncated}


def embedding(wire: Any) -> Embedding:
    assert not isinstance(wire, InvalidParameter)
    return Embedding(model="m", revision="r", timings=Timings(), **wire)


def numbers(low: int, high: int) -> st.SearchStrategy[list[float]]:
    return st.lists(st.floats(-1e6, 1e6, width=32), min_size=low, max_size=high)


vectors = numbers(0, 24).map(packed)
forms = st.builds(
    Form,
    normalize=st.booleans(),
    raw=st.booleans(),
    dimensions=st.none() | st.integers(1, 30),
    encoding=st.sampled_from(get_args(Encoding)),
)


@given(forms, st.lists(vectors, max_size=8))
def test_a_vectors_form_does_not_depend_on_its_neighbours(form: Form, given_vectors: list[bytes]) -> None:
    """Which is why a known answer and a computed one are the same bytes, whatever else was in their batch."""
    values = [value(data) for data in given_vectors]
    alone = [made(form, [one], "m")[0] for one in values]
    assert [str(one) for one in made(form, values, "m")] == [str(one) for one in alone]


@given(numbers(1, 24))
def test_a_scaled_vector_has_length_one_and_the_same_direction(raw: list[float]) -> None:
    found = embedding(made(SCALED, [value(packed(raw))], "m")[0]).vector.astype("f8")
    length = float(np.linalg.norm(np.array(raw)))
    if length > 1e-6:
        assert found == pytest.approx(np.array(raw) / length, abs=1e-6)


def test_zeros_stay_zeros() -> None:
    assert made(SCALED, [value(bytes(16))], "m") == [value(bytes(16))]
    [int8] = made(SCALED._replace(encoding="int8"), [value(bytes(16))], "m")
    assert embedding(int8).vector.tolist() == [0.0] * 4


def test_only_the_form_changes() -> None:
    given_value = value(packed([3, 4]), truncated=True)
    assert made(SCALED, [given_value], "m") == [value(packed([0.6, 0.8]), truncated=True)]


@given(numbers(2, 24), st.data())
def test_a_cut_vector_is_scaled_anew(raw: list[float], data: st.DataObject) -> None:
    kept = data.draw(st.integers(1, len(raw) - 1))
    for stored_raw in (True, False):
        form = Form(normalize=True, raw=stored_raw, dimensions=kept, encoding="float32")
        assert made(form, [value(packed(raw))], "m") == made(SCALED, [value(packed(raw[:kept]))], "m")
    plain = Form(normalize=False, raw=False, dimensions=kept, encoding="float32")
    assert made(plain, [value(packed(raw))], "m") == [value(packed(raw[:kept]))]


def test_all_dimensions_of_a_vector_that_has_its_length_change_nothing() -> None:
    whole = value(packed([0.6, 0.8]))
    assert made(Form(normalize=True, raw=False, dimensions=2, encoding="float32"), [whole], "m") == [whole]


@given(numbers(1, 24))
def test_int8_can_be_turned_back(raw: list[float]) -> None:
    found = embedding(made(Form(False, False, None, "int8"), [value(packed(raw))], "m")[0])
    assert found.codes.dtype == np.int8
    assert found.codes.shape == found.vector.shape == (found.dimensions,) == (len(raw),)
    assert found.scale == np.float32(found.scale)
    assert int(np.abs(found.codes.astype(int)).max()) <= 127
    half = found.scale / 2 + max(map(abs, raw)) * 2e-6 + 1e-37
    assert np.abs(found.vector.astype("f8") - np.array(raw)).max() <= half


@given(numbers(8, 40))
def test_binary_is_the_signs_as_sentence_transformers_packs_them(raw: list[float]) -> None:
    raw = raw[: len(raw) // 8 * 8]
    found = embedding(made(Form(True, True, None, "binary"), [value(packed(raw))], "m")[0])
    assert found.codes.dtype == np.uint8
    assert found.codes.tolist() == np.packbits(np.array(raw) > 0).tolist()
    assert found.dimensions == len(raw)
    assert found.codes.shape == (len(raw) // 8,)
    assert found.vector.tolist() == [1.0 if number > 0 else -1.0 for number in raw]


def test_sentence_transformers_quantizes_to_the_same_bits() -> None:
    quantization = pytest.importorskip("sentence_transformers.quantization", reason="the heavy extra is not installed")
    rows = np.random.default_rng(1).normal(size=(5, 384)).astype("f4")
    found = made(Form(False, False, None, "binary"), [value(row.tobytes()) for row in rows], "m")
    theirs = quantization.quantize_embeddings(rows, precision="ubinary")
    assert [embedding(one).codes.tolist() for one in found] == theirs.tolist()


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(get_args(Encoding)))
def test_what_cannot_be_made_names_the_model_and_the_limit(wanted: int, width: int, encoding: Encoding) -> None:
    found = refusal(EmbedParams(dimensions=wanted, encoding=encoding), width, "minilm")
    assert (found is None) == (wanted <= width and (encoding != "binary" or wanted % 8 == 0))
    if found is not None:
        assert "'minilm'" in found.message
        assert wanted <= width or str(width) in found.message
    [entry] = made(Form(True, True, wanted, encoding), [value(bytes(4 * width))], "minilm")
    assert isinstance(entry, InvalidParameter) == (found is not None)


def test_a_vector_of_another_length_beside_it_is_refused_alone() -> None:
    found = made(SCALED._replace(dimensions=3), [value(packed([1, 2, 3])), value(packed([1, 2]))], "m")
    assert [isinstance(entry, InvalidParameter) for entry in found] == [False, True]


def test_what_is_made_of_what_is_stored() -> None:
    raw = EmbedParams(normalize=False)
    assert form_of(EmbedParams(), raw) == SCALED
    assert form_of(EmbedParams(truncate=True), EmbedParams()) is None
    assert form_of(EmbedParams(dimensions=8), EmbedParams()) == Form(True, False, 8, "float32")
    assert form_of(EmbedParams(normalize=False, encoding="int8"), raw) == Form(False, False, None, "int8")
    assert form_of(ClassifyParams(), ClassifyParams()) is None


def test_a_form_that_is_none_and_forms_that_differ_are_told_apart() -> None:
    asked = [
        EmbedParams(normalize=normalize, dimensions=dimensions, encoding=encoding)
        for normalize, dimensions, encoding in itertools.product((True, False), (None, 8, 16), get_args(Encoding))
    ]
    found = [form_of(params, stored_params(params, "sentence_transformers")) for params in asked]
    assert len(set(found)) == len(asked)
    assert found.count(None) == 1


def test_what_is_no_vector_is_told() -> None:
    for strange in ({"labels": []}, {"data": b"abc"}, {"data": None}):
        with pytest.raises((KeyError, TypeError, ValueError)):
            made(SCALED, [strange], "m")


def test_a_scale_travels_as_it_is() -> None:
    [wire] = made(Form(False, False, None, "int8"), [value(packed([0.1, -math.pi]))], "m")
    assert isinstance(wire, dict)
    assert struct.unpack("<f", struct.pack("<f", wire["scale"]))[0] == wire["scale"]
