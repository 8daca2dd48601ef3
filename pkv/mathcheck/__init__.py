"""Is this answer right: read the answer out of a text, compare it exactly with the gold answer.

`extract_answer` finds the answer, `parse_number` reads it as an exact rational, `is_right` compares it with the gold
one; only what rationals and text cannot decide goes to math-verify, inside a `VerifyPool` of killable processes.
Not here: what being right is worth (see rewards). No jax.
"""

from pkv.mathcheck.extract import Extraction, extract_answer
from pkv.mathcheck.numbers import Number, parse_number, read_number, unit_of
from pkv.mathcheck.pool import VerifyError, VerifyPool
from pkv.mathcheck.verify import is_right

__all__ = [
    "Extraction",
    "Number",
    "VerifyError",
    "VerifyPool",
    "extract_answer",
    "is_right",
    "parse_number",
    "read_number",
    "unit_of",
]
