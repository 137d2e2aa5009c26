"""Prophet: ``forecast``, ``decompose``, ``detect_anomalies``. Fits a model to each series; there are no weights.

Prophet draws its uncertainty samples from numpy's global generator. Here that generator is seeded for each
series from the series and its parameters (``seed_of``), so an answer is reproducible and does not depend on its
neighbours; ``Prophet(...).fit(history).predict(times)`` after ``numpy.random.seed(seed_of(...))`` gives the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self

import numpy as np
from pydantic import Field

from cortex_tasks.errors import CortexError, InferenceFailed, InvalidInput, InvalidParameter, ModelUnavailable
from cortex_tasks.payloads import AnomalyParams, DecomposeParams, ForecastParams, Params, Series, SeriesParams
from workers.adapters._options import Options, read_options
from workers.adapters.base import Adapter, Item, LoadContext, WireValue

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

__all__ = ["ProphetAdapter", "future_of", "seed_of", "times_of"]

#: Whatever queues.yaml allows, more than this is refused: a fit's memory and time grow with it.
MAX_HISTORY_POINTS: Final = 100_000
MAX_HORIZON_POINTS: Final = 20_000
#: Rows of one ``predict``: it holds several arrays of rows x 1,000 samples (about 30 kB a row).
_PREDICT_ROWS: Final = 4_096
#: The optimiser writes its parameters with so many digits: a smaller deviation, as a part of the largest |y|,
#: is no deviation.
_RESOLUTION: Final = 1e-6
_COMMAND: Final = re.compile(r"Command '.*?' failed:\s*", re.DOTALL)
#: The parameters that decide a fit; the others decide what is predicted with it.
_FIT_PARAMS: Final = (
    "growth",
    "seasonality_mode",
    "yearly_seasonality",
    "weekly_seasonality",
    "daily_seasonality",
    "changepoint_prior_scale",
)
#: numpy's global generator belongs to one prediction at a time.
_GENERATOR: Final = threading.Lock()


class _Options(Options):
    #: The optimiser is stopped after this; the series then fails.
    fit_timeout_s: float = Field(default=120.0, gt=0)


@dataclass(frozen=True, slots=True)
class _History:
    """One prepared input. ``future`` is empty except for forecasts."""

    series: Series
    times: pd.DatetimeIndex
    future: pd.DatetimeIndex


def times_of(series: Series) -> pd.DatetimeIndex:
    """The timestamps, datetime64[us]."""
    import pandas as pd

    stamps = [datetime.fromisoformat(stamp) for stamp in series.ds]
    return pd.DatetimeIndex(np.array(stamps, dtype="datetime64[us]"))


def future_of(times: pd.DatetimeIndex, horizon: int, frequency: str | None) -> pd.DatetimeIndex:
    """The ``horizon`` timestamps after the last of ``times``, datetime64[us].

    Without a frequency it is inferred from all the history, else from its last five points, else it is the
    median spacing. Raises InvalidParameter.
    """
    import pandas as pd

    named = f"frequency {frequency!r}" if frequency is not None else "the spacing of the history"
    try:
        step = pd.tseries.frequencies.to_offset(frequency) if frequency is not None else _spacing(times)
        future = pd.date_range(times[-1], periods=horizon + 1, freq=step)
        future = future[future > times[-1]][:horizon].as_unit("us")
        # Again, since what was later by nanoseconds no longer is.
        later = len(future) == horizon and future[0] > times[-1]
        forward = later and future.is_unique and future[-1].year <= 9999
    except (ValueError, OverflowError, TypeError) as error:
        raise InvalidParameter(
            f"{named} cannot be used: {str(error)[:200]}; name a pandas offset alias such as 'D', 'h' or 'MS'",
            {"frequency": frequency},
        ) from None
    if not forward:
        raise InvalidParameter(
            f"{named} does not lead to {horizon:,} later timestamps before the year 10000, at least 1 µs apart",
            {"frequency": frequency, "horizon": horizon},
        )
    return future


def _spacing(times: pd.DatetimeIndex) -> Any:
    import pandas as pd

    for part in (times, times[-5:]):
        if len(part) > 2:
            with warnings.catch_warnings():
                # pandas announces that it will return an offset instead of its name; either will do.
                warnings.simplefilter("ignore")
                inferred = pd.infer_freq(part)
            if inferred is not None:
                return pd.tseries.frequencies.to_offset(inferred)
    return pd.Timedelta(np.median(np.diff(times.to_numpy())))


def seed_of(series: Series, params: Params) -> int:
    """The 32-bit seed for the uncertainty samples of one series."""
    text = json.dumps([series.ds, series.y, params.canonical()])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")


class ProphetAdapter(Adapter):
    """Options: ``fit_timeout_s`` (float, default 120). Each item of a batch fits, and fails, by itself."""

    version: ClassVar[str] = "1"

    def __init__(self, fit_timeout_s: float) -> None:
        self._fit_timeout_s = fit_timeout_s

    @classmethod
    def load(cls, context: LoadContext) -> Self:
        """Raises ConfigError for unknown options, ModelUnavailable when Prophet or its optimiser is not there."""
        options = read_options(_Options, context)
        # It complains of plotly while it is imported.
        logging.getLogger("prophet.plot").setLevel(logging.CRITICAL)
        try:
            from prophet import Prophet

            Prophet()
        except Exception as error:
            raise ModelUnavailable(
                f"Prophet cannot be used: {type(error).__name__}: {error}; pip install 'datapunk-cortex[prophet]'"
            ) from error
        # What goes wrong is told as an error of the series; the rest is chatter. Without a handler cmdstanpy
        # would set its own up, and its level again.
        logging.getLogger("cmdstanpy").addHandler(logging.NullHandler())
        for name in ("prophet", "cmdstanpy"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        return cls(options.fit_timeout_s)

    @property
    def size_bytes(self) -> int:
        """The optimiser's program; what a fit takes is given back after it."""
        import prophet

        return (Path(prophet.__file__).parent / "stan_model" / "prophet_model.bin").stat().st_size

    @property
    def library(self) -> str:
        return f"prophet {metadata.version('prophet')}, cmdstanpy {metadata.version('cmdstanpy')}"

    def example(self, task: str) -> tuple[Sequence[Any], Params]:
        days = [f"2024-01-{day:02}T00:00:00" for day in range(1, 21)]
        # Ragged on purpose: on a smooth curve the optimiser creeps on to its limit of 10,000 steps.
        series = Series(ds=tuple(days), y=tuple(float(day + day * 37 % 11) for day in range(1, 21)))
        params: dict[str, Params] = {
            "forecast": ForecastParams(horizon=7),
            "decompose": DecomposeParams(),
            "detect_anomalies": AnomalyParams(),
        }
        return [series], params[task]

    def prepare(self, task: str, inputs: Sequence[Any], params: Params) -> list[Item | CortexError]:
        """``cost_tokens``: points of history and horizon. Refuses too long a series and a useless frequency."""
        return [self._prepare(series, params) for series in inputs]

    def _prepare(self, series: Series, params: Params) -> Item | CortexError:
        horizon = params.horizon if isinstance(params, ForecastParams) else 0
        if len(series.y) > MAX_HISTORY_POINTS:
            return InvalidInput(f"a series of {len(series.y):,} points is over the limit of {MAX_HISTORY_POINTS:,}")
        if horizon > MAX_HORIZON_POINTS:
            return InvalidParameter(f"horizon is {horizon:,}, over the limit of {MAX_HORIZON_POINTS:,} points")
        times = times_of(series)
        try:
            future = future_of(times, horizon, params.frequency) if isinstance(params, ForecastParams) else times[:0]
        except InvalidParameter as error:
            return error
        return Item(_History(series, times, future), len(times) + horizon)

    def forward(self, task: str, items: Sequence[Item], params: Params) -> Sequence[WireValue | CortexError]:
        return [self._answer(item.data, params) for item in items]

    def _answer(self, history: _History, params: Params) -> WireValue | CortexError:
        try:
            match params:
                case ForecastParams():
                    return self._forecast(history, params)
                case DecomposeParams():
                    return self._decompose(history, params)
                case AnomalyParams():
                    return self._detect_anomalies(history, params)
        except CortexError as error:
            return error
        except Exception as error:
            reason = _COMMAND.sub("", " ".join(str(error).split()))[:300]
            return InferenceFailed(
                f"Prophet could not fit this series of {len(history.times):,} points: {type(error).__name__}: {reason}"
            )
        return InferenceFailed(f"Prophet knows no task with {type(params).__name__}")

    # ---------------------------------------------------------------------------------------- the tasks

    def _forecast(self, history: _History, params: ForecastParams) -> WireValue:
        model = self._fit(history, params, interval_width=params.interval_width)
        shown = history.times if params.include_history else history.times[:0]
        rows = _predict(model, shown, history.future, seed_of(history.series, params))
        known = history.series.ds if params.include_history else ()
        ds = [*known, *(stamp.isoformat() for stamp in history.future.to_pydatetime())]
        return {"ds": ds} | {name: _column(rows[name]) for name in ("yhat", "yhat_lower", "yhat_upper", "trend")}

    def _decompose(self, history: _History, params: DecomposeParams) -> WireValue:
        """``y = trend + sum of seasonalities + residual``; when multiplicative the seasonalities are parts of the
        trend: ``y = trend x (1 + sum of seasonalities) + residual``."""
        model = self._fit(history, params, uncertainty_samples=0)
        rows = model.predict(_frame(history.times))
        y = np.asarray(history.series.y)
        return {
            "ds": list(history.series.ds),
            "y": list(history.series.y),
            "trend": _column(rows["trend"]),
            "seasonalities": {name: _column(rows[name]) for name in model.seasonalities},
            "residual": _column(y - rows["yhat"].to_numpy()),
        }

    def _detect_anomalies(self, history: _History, params: AnomalyParams) -> WireValue:
        """Points outside the interval by more than the fit's own precision, so that a perfect fit has none."""
        model = self._fit(history, params, interval_width=params.interval_width)
        rows = _predict(model, history.times, history.future, seed_of(history.series, params))
        y = np.asarray(history.series.y)
        yhat, lower, upper = (np.array(_column(rows[name])) for name in ("yhat", "yhat_lower", "yhat_upper"))
        resolution = _RESOLUTION * float(np.abs(y).max())
        distance = np.maximum(lower - y, y - upper)
        half_width = np.maximum((upper - lower) / 2, max(resolution, np.finfo(float).tiny))
        score = _column(distance / half_width)
        return {
            "points": [
                {
                    "ds": history.series.ds[i],
                    "y": history.series.y[i],
                    "yhat": float(yhat[i]),
                    "yhat_lower": float(lower[i]),
                    "yhat_upper": float(upper[i]),
                    "score": score[i],
                }
                for i in np.flatnonzero(distance > resolution)
            ],
            "checked": len(y),
        }

    def _fit(self, history: _History, params: SeriesParams, **more: Any) -> Any:
        """The model of a series. ``more`` decides what is predicted with it, and nothing of the fit itself."""
        fitted = {name: getattr(params, name) for name in _FIT_PARAMS}
        memo, key = self.memo, self._key(history.series, fitted)
        kept = memo.recall(key) if memo is not None else None
        model = _restored(kept, more) if kept is not None else None
        if model is None:
            model = self._fit_anew(history, fitted | more)
            if memo is not None:
                memo.keep(key, _saved(model))
        return model

    def _key(self, series: Series, fitted: dict[str, Any]) -> str:
        """All that decides a fit."""
        text = json.dumps([self.library, self.version, series.ds, series.y, fitted], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _fit_anew(self, history: _History, options: dict[str, Any]) -> Any:
        from prophet import Prophet

        model = Prophet(**options)
        frame = _frame(history.times)
        frame["y"] = history.series.y
        # Left to itself the optimiser's wrapper keeps the files of each fit until the process ends.
        with tempfile.TemporaryDirectory(prefix="prophet-") as scratch:
            return model.fit(frame, output_dir=scratch, timeout=self._fit_timeout_s)


def _saved(model: Any) -> bytes:
    """A fitted model in the library's own JSON."""
    from prophet.serialize import model_to_dict

    kept = model_to_dict(model)
    # Whole microseconds: the library writes whole milliseconds, and an answer must not depend on what was kept.
    kept["cortex_times_us"] = model.history["ds"].to_numpy().astype("datetime64[us]").astype(int).tolist()
    return json.dumps(kept).encode()


def _restored(kept: bytes, options: dict[str, Any]) -> Any | None:
    """The model again, None when it cannot be read: it is fitted anew then."""
    from prophet.serialize import model_from_dict

    try:
        saved = json.loads(kept)
        times = np.array(saved.pop("cortex_times_us"), dtype="datetime64[us]")
        model = model_from_dict(saved)
        model.history["ds"] = times
        model.history_dates = model.history["ds"].sort_values()
    except Exception as error:
        logger.warning("a fit that was kept cannot be read and is made again: %s", type(error).__name__)
        return None
    for name, value in options.items():
        setattr(model, name, value)
    return model


def _frame(times: pd.DatetimeIndex) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame({"ds": times})


def _predict(model: Any, past: pd.DatetimeIndex, future: pd.DatetimeIndex, seed: int) -> pd.DataFrame:
    """``model.predict``, the same each time. A long history goes in blocks; the future, whose uncertainty adds
    up from step to step, stays whole."""
    import pandas as pd

    if len(past) + len(future) <= _PREDICT_ROWS:
        blocks = [pd.DatetimeIndex(past.append(future))]
    else:
        blocks = [past[start : start + _PREDICT_ROWS] for start in range(0, len(past), _PREDICT_ROWS)]
        blocks += [future] if len(future) else []
    # What overflows is found, and told, by _column.
    with _seeded(seed), np.errstate(over="ignore", invalid="ignore"):
        rows: pd.DataFrame = pd.concat([model.predict(_frame(block)) for block in blocks], ignore_index=True)
    return rows


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with _GENERATOR:
        before = np.random.get_state()
        np.random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(before)


def _column(values: Any) -> list[float]:
    """Raises InferenceFailed for what JSON cannot say."""
    numbers = np.asarray(values, dtype=float)
    if not np.isfinite(numbers).all():
        raise InferenceFailed("Prophet's answer to this series is not finite; scale its values")
    column: list[float] = numbers.tolist()
    return column
