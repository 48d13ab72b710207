"""Times of a log as Unix seconds. The unit can be told from the values: of any two units only one gives a date between
1976 and 2100."""

from __future__ import annotations

import logging
from datetime import UTC, datetime

import numpy as np
import pandas as pd

from .schema import DataError, refuse, refuse_text

logger = logging.getLogger(__name__)

# Units to a second: a quotient is rounded once, so that a time on the very border of a period is on its right side.
UNITS_PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
TIMESTAMP_UNITS = (*UNITS_PER_SECOND, "iso")
_EARLIEST, _LATEST = 2e8, 4_102_444_800  # of dates as a log has them: 1976 to 2100
_FIRST_YEAR, _LAST_YEAR = -62_135_596_800, 253_402_300_799  # of any date: 1 to 9999


def unix_seconds(values: pd.Series, unit: str | None, source: str) -> pd.Series:
    """Unix time [s], NaN where missing.

    Args:
        values: numbers, date-times (which need no unit) or, of the unit `"iso"`, text.
        unit: one of `TIMESTAMP_UNITS`, or how text is written as `strptime` has it, such as `"%d.%m.%Y %H:%M"`. By
            default what the values say, which is logged where it is not seconds; seconds where they say nothing, such
            as times since a start of the log's own.

    Raises:
        DataError: a value that is no time, a unit that contradicts the values, a date after 2100 in a log of dates.
    """
    if pd.api.types.is_bool_dtype(values.dtype):
        bad, remedy = values.notna().to_numpy(), "Name the column of the times."
        refuse(source, str(values.name), bad, values, "holds true and false where times are needed", remedy)
    if unit is not None and "%" in unit:
        return _of_dates(values, unit, source)
    if unit != "iso" and not _has_units(values):
        numbers = pd.to_numeric(values, errors="coerce").notna().any()
        if unit is not None or numbers:
            remedy = "Set timestamp_unit: iso for date-times as text, or give numbers."
            refuse_text(values, str(values.name), source, "times", remedy)
        logger.warning("%s: column '%s' is read as ISO date-times (timestamp_unit: iso).", source, values.name)
        unit = "iso"
    if unit == "iso" or pd.api.types.is_datetime64_any_dtype(values.dtype):
        return _of_dates(values, unit, source)
    numbers = pd.Series(values.to_numpy(dtype="float64", na_value=np.nan), index=values.index, name=values.name)
    median = numbers[numbers > 0].median()
    likely = likely_unit(median)
    if unit is None:
        unit = likely or "s"
        if unit != "s":
            text = "%s: column '%s' is read as Unix time in %s (timestamp_unit: %s), %s among them."
            logger.warning(text, source, values.name, unit, unit, _date(median / UNITS_PER_SECOND[unit]))
    elif likely not in (None, unit):
        raise DataError(
            f"{source}: column '{values.name}' holds times such as {median:.0f}, which is "
            f"{_date(median / UNITS_PER_SECOND[likely])} in {likely}, but timestamp_unit is {unit}. Correct "
            "timestamp_unit; give times since a start of the log's own in seconds."
        )
    seconds = numbers / UNITS_PER_SECOND[unit]
    _refuse_impossible(seconds, values, dated=likely is not None, source=source)
    return seconds


def _has_units(values: pd.Series) -> bool:
    dtype = values.dtype
    return pd.api.types.is_numeric_dtype(dtype) or pd.api.types.is_datetime64_any_dtype(dtype)


def _of_dates(values: pd.Series, unit: str | None, source: str) -> pd.Series:
    written = {"iso": "ISO8601"}.get(unit, unit)
    text = values
    if written and pd.api.types.is_numeric_dtype(values):
        # 20200705 of a CSV file is a number, a whole one.
        whole = values.where((values % 1 == 0) & (values.abs() < 1e15)).astype("Int64").astype("string")
        text = whole.fillna(values.astype("string"))
    times = pd.to_datetime(text, utc=True, errors="coerce", format=written)
    unread = (times.isna() & values.notna()).to_numpy()
    remedy = "Correct timestamp_unit, or the values."
    what = "an ISO date-time" if unit == "iso" else f"a date-time written as {unit}"
    refuse(source, str(values.name), unread, values, f"is not {what}", remedy)
    return (times.dt.tz_localize(None).astype("datetime64[us]").astype("int64") / 1e6).where(times.notna())


def likely_unit(time: float) -> str | None:
    """The unit in which it is a date as logs have them; None where it is one in no unit, or not known."""
    fitting = [unit for unit, per_second in UNITS_PER_SECOND.items() if _EARLIEST <= time / per_second < _LATEST]
    return fitting[0] if fitting else None


def _refuse_impossible(seconds: pd.Series, values: pd.Series, dated: bool, source: str) -> None:
    latest, lowest = _LATEST if dated else _LAST_YEAR, seconds.min()
    if lowest > 0 and seconds.max() <= latest:
        return
    late = ((seconds > latest) | (seconds < _FIRST_YEAR)).to_numpy()
    remedy = "Leave it empty where the time is not known, with a position beside it, or drop the row."
    refuse(source, str(values.name), late, values, "holds what is no date of a log (timestamp_unit)", remedy)
    early = (seconds <= 0).to_numpy() & dated
    if early.any():
        row = int(np.flatnonzero(early)[0])
        text = "%s: column '%s' is %s in %d of %d rows, first at row %d: these come first in a user's log."
        logger.warning(text, source, values.name, values.iloc[row], early.sum(), len(early), row)


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).date().isoformat()
