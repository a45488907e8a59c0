#!/usr/bin/env python3
"""Counts instructions in the hot loops of a program for 64-bit Arm.

Reads `objdump -d --no-show-raw-insn` from standard input.

A hot loop is a loop without another inside, in code that was compiled for NEON, of at least 24 products by an element of a
register: those of the widest strip. They are `fmla` of f32 and `bfdot` of pairs of bf16. Polynomials, as of a soft cap, multiply by
whole registers. Fails where a hot loop has more than 1.5 instructions for each product, or where one of the two has no hot loop.
"""

import re
import sys

LEAST = 24
MOST_PER_PRODUCT = 1.5
# By an element: of 4 f32, or of 4 pairs; and what the names of functions say that were compiled for them.
PRODUCTS = {"fmla": (r"fmla\s.*\.s\[\d\]$", "Neon"), "bfdot": (r"bfdot\s.*\.2h\[\d\]$", "bf16_pairs")}


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
    worst = dict.fromkeys(PRODUCTS, 0.0)
    for function, body in loops(sys.stdin):
        for name, (pattern, compiled_for) in PRODUCTS.items():
            count = sum(bool(re.match(pattern, instruction)) for instruction in body)
            if count >= LEAST and compiled_for in function:
                print(f"hot loop: {len(body)} instructions, {count} {name}, {len(body) / count:.2f} for each")
                worst[name] = max(worst[name], len(body) / count)
    for name, most in worst.items():
        if not 0.0 < most <= MOST_PER_PRODUCT:
            sys.exit(f"error: expected loops of at most {MOST_PER_PRODUCT} instructions for each {name}")


if __name__ == "__main__":
    main()
