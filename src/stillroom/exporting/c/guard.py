"""What a program calls: the network behind a check of its observation. C text, from the sizes and the ranges alone."""

from __future__ import annotations

from collections.abc import Sequence
from string import Template

_HEADER = Template("""\
/* $name: one observation of $inputs floats in, $outputs floats out. Allocates nothing, keeps no state, calls no one. */
#ifndef ${NAME}_H
#define ${NAME}_H
#ifdef __cplusplus
extern "C" {
#endif

#define ${NAME}_INPUTS $inputs
#define ${NAME}_OUTPUTS $outputs

enum {
    ${NAME}_OK = 0,
    ${NAME}_NOT_FINITE = 1,   /* the observation holds NaN or an infinity */
    ${NAME}_OUT_OF_RANGE = 2, /* an observation outside the ranges of the calibration inputs */
    ${NAME}_OVERFLOW = 3      /* the observation is finite, the answer is not */
};

/* Each returns ${NAME}_OK, or one of the others and then leaves out as it was. in and out may not overlap.
   Any finite observation: */
int ${name}_run(const float in[${NAME}_INPUTS], float out[${NAME}_OUTPUTS]);
/* Finite; each number is first moved into the range that it had in the calibration inputs: */
int ${name}_run_clamped(const float in[${NAME}_INPUTS], float out[${NAME}_OUTPUTS]);
/* Only observations within those ranges; what lies outside is refused: */
int ${name}_run_within(const float in[${NAME}_INPUTS], float out[${NAME}_OUTPUTS]);

extern const float ${name}_low[${NAME}_INPUTS], ${name}_high[${NAME}_INPUTS]; /* those ranges */

#ifdef __cplusplus
}
#endif
#endif
""")

_GUARD = Template("""
/* The guard. It looks at bits, so that it still sees NaN and infinities under -ffast-math. */
#include <string.h>
#include "$name.h"

const float ${name}_low[${NAME}_INPUTS] = {$low};
const float ${name}_high[${NAME}_INPUTS] = {$high};

static int ${name}_finite(const float *numbers, int count) {
    for (int i = 0; i < count; ++i) {
        uint32_t bits;
        memcpy(&bits, &numbers[i], sizeof bits);
        if ((bits & UINT32_C(0x7f800000)) == UINT32_C(0x7f800000)) return 0;
    }
    return 1;
}

static int ${name}_answer(const float *in, float *out) {
    float answer[${NAME}_OUTPUTS];
    ${name}_network((const void *)in, (void *)answer);
    if (!${name}_finite(answer, ${NAME}_OUTPUTS)) return ${NAME}_OVERFLOW;
    memcpy(out, answer, sizeof answer);
    return ${NAME}_OK;
}

int ${name}_run(const float in[${NAME}_INPUTS], float out[${NAME}_OUTPUTS]) {
    return ${name}_finite(in, ${NAME}_INPUTS) ? ${name}_answer(in, out) : ${NAME}_NOT_FINITE;
}

int ${name}_run_clamped(const float in[${NAME}_INPUTS], float out[${NAME}_OUTPUTS]) {
    float inside[${NAME}_INPUTS];
    if (!${name}_finite(in, ${NAME}_INPUTS)) return ${NAME}_NOT_FINITE;
    for (int i = 0; i < ${NAME}_INPUTS; ++i) {
        inside[i] = in[i] < ${name}_low[i] ? ${name}_low[i] : in[i] > ${name}_high[i] ? ${name}_high[i] : in[i];
    }
    return ${name}_answer(inside, out);
}

int ${name}_run_within(const float in[${NAME}_INPUTS], float out[${NAME}_OUTPUTS]) {
    if (!${name}_finite(in, ${NAME}_INPUTS)) return ${NAME}_NOT_FINITE;
    for (int i = 0; i < ${NAME}_INPUTS; ++i) {
        if (in[i] < ${name}_low[i] || in[i] > ${name}_high[i]) return ${NAME}_OUT_OF_RANGE;
    }
    return ${name}_answer(in, out);
}
""")

_HARNESS = Template("""\
/* Answers N observations drawn from the calibration ranges, then what must be refused:
   gcc -O2 $file ${name}_main.c -lm -o $name && ./$name 1000
   Exit code 0 where every answer was finite and every refusal left its output alone. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include "$name.h"

static uint32_t state = 1u;

static float between(float low, float high) { /* a linear congruential draw: no library, the same everywhere */
    state = state * 1664525u + 1013904223u;
    return low + (high - low) * (float)(state >> 8) / 16777216.0f;
}

static int refused(float bad, int wanted, int (*run)(const float *, float *)) {
    float in[${NAME}_INPUTS], out[${NAME}_OUTPUTS];
    for (int i = 0; i < ${NAME}_INPUTS; ++i) in[i] = ${name}_low[i];
    for (int i = 0; i < ${NAME}_OUTPUTS; ++i) out[i] = 42.0f;
    in[${NAME}_INPUTS - 1] = bad;
    if (run(in, out) != wanted) return 0;
    for (int i = 0; i < ${NAME}_OUTPUTS; ++i) if (out[i] != 42.0f) return 0;
    return 1;
}

int main(int count, char **arguments) {
    long calls = count > 1 ? atol(arguments[1]) : 1000;
    float in[${NAME}_INPUTS], out[${NAME}_OUTPUTS];
    double sum = 0;
    for (long call = 0; call < calls; ++call) {
        for (int i = 0; i < ${NAME}_INPUTS; ++i) in[i] = between(${name}_low[i], ${name}_high[i]);
        if (${name}_run(in, out) != ${NAME}_OK) return 1;
        for (int i = 0; i < ${NAME}_OUTPUTS; ++i) sum += out[i];
    }
    if (!refused(NAN, ${NAME}_NOT_FINITE, ${name}_run) || !refused(INFINITY, ${NAME}_NOT_FINITE, ${name}_run) ||
        !refused(-INFINITY, ${NAME}_NOT_FINITE, ${name}_run_clamped) ||
        !refused(NAN, ${NAME}_NOT_FINITE, ${name}_run_within) ||
        !refused(nextafterf(${name}_high[${NAME}_INPUTS - 1], INFINITY), ${NAME}_OUT_OF_RANGE, ${name}_run_within)) {
        return 2;
    }
    printf("%ld answers, mean %.9g\\n", calls, sum / ((double)(calls > 0 ? calls : 1) * ${NAME}_OUTPUTS));
    return 0;
}
""")


def header(name: str, inputs: int, outputs: int) -> str:
    """NAME.h: three entries and their return codes."""
    return _HEADER.substitute(name=name, NAME=name.upper(), inputs=inputs, outputs=outputs)


def guard(name: str, low: Sequence[float], high: Sequence[float]) -> str:
    """The entries, to stand after ``static void NAME_network(in, out)``; ranges as exact hexadecimal floats."""
    ends = {"low": ", ".join(map(_exact, low)), "high": ", ".join(map(_exact, high))}
    return _GUARD.substitute(name=name, NAME=name.upper(), **ends)


def harness(name: str, file: str) -> str:
    """NAME_main.c: a program that answers, refuses and says so, to be run on the machine that it is meant for."""
    return _HARNESS.substitute(name=name, NAME=name.upper(), file=file)


def _exact(number: float) -> str:
    return f"{float(number).hex()}f"
