"""Arithmetic read out of running text: what is true isn't taken for false, and what is false is found in any dress."""

from __future__ import annotations

import pytest

from pkv.rewards.equations import find_equations
from pkv.rewards.notation import normalise


def said(text: str) -> list[bool | None]:
    return [equation.holds for equation in find_equations(normalise(text))]


TRUE = """
20 / 5 = 4
4 = 20 / 5
So 20 divided by 5 is 4, and 6 times 4 equals 24.
- 45 - 12 = 33\\n- 33 + 20 = 53
1. 20 / 5 = 4\\n2. 4 * 6 = 24
20 / 5 = 4\\n4 * 6 = 24
100 / 3 ≈ 33
100 / 3 = 33.33
100 / 3 is about 33
200 / 3 = 66.6...
2/3 = 0.66
1,5 * 3 = 4,5
5.000 + 200 = 5.200
1,000 + 250 = 1,250
\\sqrt{81 + 144} = 15
sqrt(16) = 4
√16 = 4
√(9 + 16) = 5
50 * 20% = 10
20% of 50 = 10
20 percent of 50 is 10
3/4 = 75%
1/3 = 33.3%
15 / 60 * 100 = 25%
20% + 30% = 50%
2 dozen + 6 = 30
2^{3+1} = 16
2**3 = 8
2^-1 = 0.5
10^{-2} * 300 = 3
5 squared is 25
3² + 4² = 25
5 cm^2 + 3 cm^2 = 8 cm^2
5 cm² + 3 cm² = 8 cm²
2 1/2 + 1/2 = 3
2\\frac{1}{2} + \\frac12 = 3
\\frac{20}{\\frac{5}{6}} = 24
3(4 + 2) = 18
(2)(3) = 6
.5 * 4 = 2
$4.50 * 2 = $9
20 candles / 5 hives = 4 candles per hive
6 hives times 4 is 24
6 hives times 4 candles is 24
(20 / 5 = 4)
5 * (20 / 5 = 4)
**20** / **5** = **4**
**20 / 5 = 4**
the share is `20 / 5` = `4`
[18 + 6] = 24
20 : 5 = 4
20:5 = 4
6 x 4 = 24
6x4 = 24
18 + 6 ≡ 24
18 ＋ 6 ＝ 24
6 • 4 = 24
6 ⨯ 4 = 24
twenty / five = four
twenty-four / six = 4
2e3 * 2 = 4000
\\text{share} = 20 / 5 = 4
$\\frac{20}{5} = 4$ $6 \\times 4 = 24$
20 / 5 &= 4 \\ 6 * 4 &= 24
20 / 5 = 4 → 6 * 4 = 24
20 / 5 = 4 => 6 * 4 = 24
20 / 5 -> 4
18 + 6 comes to 24
18 + 6 totals 24
24 - 6 leaves 18
18 + 6 makes 24
20 candles and 4 more = 24, 20 + 4 candles are 24
1/2 of 20 = 10
1/2 of 20 + 4 = 14
50 / 4 = 12.5 each
= 20 / 5 = 4
-5 + 3 = -2
5 - -3 = 8
x = 24 / 6 = 4
3×10⁴ = 30000
2⁵ × 2 = 64
$0.\\overline{3} \\times 3 = 1$
$0.1\\overline{6} \\times 6 = 1$
100 / 3 = 33.\\overline{3}
18 + 6 gives us 24
18 + 6 will be 24
18 + 6 results in 24
18 + 6 equals exactly 24
18 + 6 = exactly 24
18 + 6, which is 24
18 + 6 gives: 24
18 + 6 = "24"
6 hives * 4 candles/hive = 24 candles
6(4) = 24
$2(3)^2 + 4 = 22$
200 + 15% = 230
200 - 10% = 180
20 / 5 = 4 and 6 * 4 = 24
(1,000 + 200) = 1,200
""".strip().splitlines()

UNKNOWN = """
20 / 3 = 6 remainder 2
20 / 3 = 6 R 2
20 / 3 = 6 with a remainder of 2
20 / 3 = 6 with 2 left over
3 hours + 30 minutes = 3.5 hours
1 foot + 6 inches = 18 inches
25 cents * 4 = $1
2 hours = 2 * 60 minutes
\\log(100) = 2
log(100) + 1 = 3
\\sin(30) = 0.5
abs(3 - 5) + 1 = 3
floor(7 / 2) = 3
\\sum_{i=1}^{4} i = 10
5! / 4! = 5
a_1 + 3 = 7
x + 3 = 7
price * 3 + 2 = 62
total - 12 = 33
half of 20 + 4 = 14
twice 12 + 1 = 25
5 + 1 is 2 more than 4
\\pi * 2^2 = 12.57
2 * 3 = x
24 - 4 = 5t
gcd(12, 18) + 1 = 7
max(3, 5) + 1 = 6
20 / 5 = 4 candles per hive * 6
20 / 5 = 4 - 6 * 4
17 / 5 = 3 (remainder 2)
17/5 = 3 remainder: 2
17 / 5 = 3 (with a remainder of 2)
17 / 5 = 3 boxes, remainder 2
$17 \\div 5 = 3 \\text{ remainder } 2$
23 / 4 = 5 groups with 3 left over
23 / 4 = 5 full boxes, with 3 candles left over
23/4 = 5 (rounded down)
23/4 = 6 rounded up
2 hours 30 minutes = 2 * 60 + 30
5 feet 6 inches = 5*12 + 6
1 hour and 20 minutes = 60 + 20
2 dozen and 3 = 2*12 + 3
75 / 60 = 1 hour 15 minutes
17 / 5 = 3 weeks and 2 days
4 boxes of 6 eggs + 3 = 27
2 apples at 3 dollars + 1 = 7
2 pairs of $10 + $5 = $25
5 less than 3 * 4 = 7
2 more than 3 * 4 is 14
3 times as many = 3 * 4
$\\binom{4}{2} \\cdot 2 = 12$
$\\sqrt[3]{27} + 1 = 4$
∛8 + 1 = 3
$123_4 + 1 = 27$
9 am - 5 pm = 8 hours
Day 2 - 8 + 3 = 11
4 quarters = 4 * $0.25
1 gallon - 1 quart = 3 quarts
2 years + 3 months = 27 months
$(1,2) + (3,4) = 11$
lcm(4,6) * 1 = 12
0.333 * 3 = 1
0.67 * 3 = 2
2π(3) + 1 = 19.85
4 (20 / 5) = 9
""".strip().splitlines()

NONE = """
5 hives make 20 candles, and 6 hives make 24
24 = 24
2^10 ≡ 24 (mod 1000)
3 * 7 ≡ 1 mod 5
The answer is 24.
20 / 5 ≠ 5
x > 5
""".strip().splitlines()

FALSE = """
18 * 6 = 18
18 x 6 = 18
18x6 = 18
18 * 6 comes to 18
18 * 6 totals 18
18 * 6 yields 18
18 * 6 make 18
18 * 6 are 18
18 * 6 becomes 18
18 * 6 get 18
18 * 6 gives 18
18 * 6 is equal to 18
18 * 6 = **18**
**18 * 6 = 18**
*18* * 6 = 18
__18__ * 6 = 18
`18` * 6 = 18
[18 * 6] = 18
(18 * 6 = 18)
18 * 6 ≡ 18
18 * 6 \\equiv 18
18 * 6 ≅ 18
18 * 6 ~ 18
18 * 6 ≈ 100
18 ＋ 6 ＝ 18
18 • 6 = 18
18 ∙ 6 = 18
18 ⨯ 6 = 18
18 : 6 = 18
1\u200b8 * 6 = 1\u200b8
18 * 6 = eighteen
18 * 6 = 18/0
18 * 6 = 1800000000000000000000000000000000000000
18 * 6 = 1 8
\\frac18 = 8
\\frac{20}{5} = 5
20 candles / 5 hives = 6 candles per hive
20 dollars / 5 = 6 dollars
20 / 5 = 6%
100 / 3 = 33
100 / 3 ≈ 40
5 / 2 = 2.4
7 / 3 = 2.4
3(6) + 0 * 1 = 20, 18 + 6 = 18
20 / 5 -> 5
2 * 3 = 7!
six times four is twenty
18 * 6 gives us 18
18 * 6 gives me 18
18 * 6 gives a total of 18
18 * 6 will be 18
18 * 6 must be 18
18 * 6 results in 18
18 * 6 equals to 18
18 * 6 is exactly 18
18 * 6 = exactly 18
18 * 6 = a total of 18
18 * 6, which is 18
18 * 6 gives: 18
18 * 6 := 18
18 * 6 = "18"
6 hives * 4 candles/hive = 18 candles
6(4) = 18
(6)(4) = 18
2(3 + 4) = 18
3(4) + 2(5) = 99
100 + 10% = 500
17 / 5 = 9
17 / 5 = 9 boxes and 2 more
3×10⁴ = 31
""".strip().splitlines()


@pytest.mark.parametrize("line", TRUE)
def test_what_is_true_is_found_true(line):
    found = said(line.replace("\\n", "\n"))
    assert found and False not in found and True in found, found


@pytest.mark.parametrize("line", UNKNOWN)
def test_what_cannot_be_worked_out_here_is_neither(line):
    found = said(line)
    assert False not in found and True not in found, found


@pytest.mark.parametrize("line", NONE)
def test_what_is_no_working_is_no_equation(line):
    assert said(line) == []


@pytest.mark.parametrize("line", FALSE)
def test_what_is_false_is_found_false(line):
    found = said(line)
    assert False in found and True not in found, found


def test_every_step_of_a_chain_is_judged_by_itself():
    assert said("2 hours = 2 * 60 = 120 minutes") == [None, True]
    assert said("20 / 5 = 4 candles per hive * 6 = 24") == [None, True]
    assert said("a_1 = 3, a_2 = 3 + 4 = 7") == [None, None, True]
