"""Formats numbers for people, the same way in the console and the report."""

_GIB = 1 << 30


def percent(fraction: float) -> str:
    """``0.8104`` as ``81.0%``."""
    return f"{fraction:.1%}"


def points(fraction: float) -> str:
    """``0.8104`` as ``81.0``: a percentage without its sign, as in ``81.0 to 82.3%``."""
    return f"{100 * fraction:.1f}"


def gibibytes(num_bytes: int, digits: int = 1) -> str:
    """``7945689498`` as ``7.4 GiB``."""
    return f"{gib(num_bytes, digits)} GiB"


def gib(num_bytes: int, digits: int = 1) -> str:
    """``7945689498`` as ``7.4``: a size without its unit, as in a column of GiB."""
    return f"{num_bytes / _GIB:.{digits}f}"


def clock(seconds: float) -> str:
    """``3725.4`` as ``1:02:05``; minutes and seconds below an hour."""
    whole = round(seconds)
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def duration(seconds: float) -> str:
    """``0.0421`` as ``0.04 s``, ``74`` as ``1 min 14 s``, ``3725`` as ``1 h 02 min``."""
    if seconds < 9.995:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, second = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {second:02} s"
    hours, minute = divmod(round(seconds / 60), 60)
    return f"{hours} h {minute:02} min"


def quantity(count: float) -> str:
    """``1234567`` as ``1.23 M``; plain digits below 10,000."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size and count >= 10_000:
            scaled = count / size
            return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f} {unit}"
    return f"{count:,.0f}"


def number(value: float) -> str:
    """Five significant digits, without an exponent where that stays short."""
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 1e6:
        return f"{value:,.5g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:.3g}"


def temperature_text(temperature: float) -> str:
    """``temperature 0.3``; ``greedy`` for 0."""
    return "greedy" if temperature == 0 else f"temperature {temperature:g}"
