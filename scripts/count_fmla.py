#!/usr/bin/env python3
"""Counts instructions in the hot loops of a program for 64-bit Arm.

Reads `objdump -d --no-show-raw-insn` from standard input.

A hot loop is a loop without another inside, in code that was compiled for NEON, of at least 24 multiplications and additions `fmla`
by an element of a register: the products of the widest strip. Polynomials, as of a soft cap, multiply by whole registers. Fails where a
hot loop has more than 1.5 instructions for each, or where there is none.
"""

import re
import sys

LEAST = 24
MOST_PER_FMLA = 1.5


def loops(lines):
    """The instructions of each innermost loop, with the function's name."""
    function, code, places = "", [], {}
    for line in lines:
        if label := re.match(r"^[0-9a-f]+ <(.*)>:", line):
            function, code, places = label[1], [], {}
        elif instruction := re.match(r"^\s+([0-9a-f]+):\s+(.*)", line):
            places[instruction[1]] = len(code)
            code.append(instruction[2])
            branch = re.match(r"(?:b\.\w+|cbn?z\s+\w+,|tbn?z\s+\w+, #\d+,)\s+([0-9a-f]+)", instruction[2])
            if branch and branch[1] in places:
                body = code[places[branch[1]] :]
                if not any(re.match(r"(b|cbn?z|tbn?z|bl|blr|br|ret)[. \t]", other) for other in body[:-1]):
                    yield function, body


def main():
    worst = 0.0
    for function, body in loops(sys.stdin):
        count = sum(bool(re.match(r"fmla\s.*\.s\[\d\]$", instruction)) for instruction in body)
        if count >= LEAST and "Neon" in function:
            print(f"hot loop: {len(body)} instructions, {count} fmla, {len(body) / count:.2f} for each")
            worst = max(worst, len(body) / count)
    if not 0.0 < worst <= MOST_PER_FMLA:
        sys.exit(f"error: expected loops of at most {MOST_PER_FMLA} instructions for each fmla")


if __name__ == "__main__":
    main()
