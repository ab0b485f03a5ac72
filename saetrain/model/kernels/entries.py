"""Loops over the entries of a code, row by row or latent by latent: what is gathered is used while it is in cache.

By row, the decoding gathers rows of the dictionary. By latent, everything else gathers rows of the batch, which are
fewer than latents and stay in the cache that cores share. Four rows are taken at a time, so that a sum is loaded and
stored once for them.
"""

import numpy as np

from actcache.compiler import compiled


@compiled
def decode_rows(starts, latents, values, decoder, edges, x, b_dec, residuals, squares, first, last):
    """Subtract from rows x - b_dec what their entries decode to: the latents below edges[0], then the next ones.

    Args:
        starts: [B + 1] int64.
        latents, values: [N] int64 and float32, in each row sorted by latent.
        decoder: [F, D] float32.
        edges: [m] int64, ascending; the last one is F.
        x, b_dec: [B, D] and [D] float32.
        residuals: [m, B, D]: residuals[p] becomes what is left of a row after the latents below edges[p] and, in a
            second pass, the sum of this and of all later ones: up to a factor, the gradient of what a latent between
            edges[p - 1] and edges[p] adds to the decoding.
        squares: [B] float64: becomes the sum of the squares of what is left, over all m.
        first, last: the rows to work on.
    """
    n_prefixes, width = len(edges), decoder.shape[1]
    for row in range(first, last):
        at, end, total = starts[row], starts[row + 1], 0.0
        for prefix in range(n_prefixes):
            line = residuals[prefix, row]
            for j in range(width):
                line[j] = 0
            stop = end
            if prefix < n_prefixes - 1:
                stop = at
                while stop < end and latents[stop] < edges[prefix]:
                    stop += 1
            while at + 4 <= stop:
                a, b = decoder[latents[at]], decoder[latents[at + 1]]
                c, d = decoder[latents[at + 2]], decoder[latents[at + 3]]
                va, vb, vc, vd = values[at], values[at + 1], values[at + 2], values[at + 3]
                for j in range(width):
                    line[j] += va * a[j] + vb * b[j] + vc * c[j] + vd * d[j]
                at += 4
            while at < stop:
                a, va = decoder[latents[at]], values[at]
                for j in range(width):
                    line[j] += va * a[j]
                at += 1
            square = np.float32(0)
            if prefix == 0:
                own = x[row]
                for j in range(width):
                    line[j] = own[j] - b_dec[j] - line[j]
                    square += line[j] * line[j]
            else:
                before = residuals[prefix - 1, row]
                for j in range(width):
                    line[j] = before[j] - line[j]
                    square += line[j] * line[j]
            total += square
        squares[row] = total
        for prefix in range(n_prefixes - 2, -1, -1):
            line, after = residuals[prefix, row], residuals[prefix + 1, row]
            for j in range(width):
                line[j] += after[j]


@compiled
def add_rows(starts, order, rows, factors, matrix, gradient, sums, first, last):
    """Add to the gradient of each latent the rows that it is active in, each times its factor.

    Args:
        starts, order: the entries by latent, [F + 1] and [N] int64 (`Code.by_latent`).
        rows, factors: [N] int64 and float32.
        matrix: [B, D] float32.
        gradient: [F, D] float32.
        sums: [F] float32: becomes the sum of the factors of each latent.
        first, last: the latents to work on.
    """
    width = matrix.shape[1]
    for latent in range(first, last):
        at, end, line, total = starts[latent], starts[latent + 1], gradient[latent], np.float32(0)
        while at + 4 <= end:
            ia, ib, ic, id_ = order[at], order[at + 1], order[at + 2], order[at + 3]
            a, b, c, d = matrix[rows[ia]], matrix[rows[ib]], matrix[rows[ic]], matrix[rows[id_]]
            fa, fb, fc, fd = factors[ia], factors[ib], factors[ic], factors[id_]
            for j in range(width):
                line[j] += fa * a[j] + fb * b[j] + fc * c[j] + fd * d[j]
            total += fa + fb + fc + fd
            at += 4
        while at < end:
            a, fa = matrix[rows[order[at]]], factors[order[at]]
            for j in range(width):
                line[j] += fa * a[j]
            total += fa
            at += 1
        sums[latent] = total


@compiled
def multiply_and_add_rows(starts, order, rows, factors, matrix, weights, gradient, products, first, last):
    """`add_rows`, and <weights[latent], row> of each entry in the same pass: products [N] float32."""
    width = matrix.shape[1]
    for latent in range(first, last):
        at, end, line, own = starts[latent], starts[latent + 1], gradient[latent], weights[latent]
        while at + 4 <= end:
            ia, ib, ic, id_ = order[at], order[at + 1], order[at + 2], order[at + 3]
            a, b, c, d = matrix[rows[ia]], matrix[rows[ib]], matrix[rows[ic]], matrix[rows[id_]]
            fa, fb, fc, fd = factors[ia], factors[ib], factors[ic], factors[id_]
            pa, pb, pc, pd = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            for j in range(width):
                pa += own[j] * a[j]
                pb += own[j] * b[j]
                pc += own[j] * c[j]
                pd += own[j] * d[j]
                line[j] += fa * a[j] + fb * b[j] + fc * c[j] + fd * d[j]
            products[ia], products[ib], products[ic], products[id_] = pa, pb, pc, pd
            at += 4
        while at < end:
            a, fa, pa = matrix[rows[order[at]]], factors[order[at]], np.float32(0)
            for j in range(width):
                pa += own[j] * a[j]
                line[j] += fa * a[j]
            products[order[at]] = pa
            at += 1


@compiled
def multiply_rows(starts, order, rows, matrix, weights, products, first, last):
    """products[entry] = <weights[latent], matrix[row]>, [N] float32, for the entries of some latents."""
    width = matrix.shape[1]
    for latent in range(first, last):
        at, end, own = starts[latent], starts[latent + 1], weights[latent]
        while at + 4 <= end:
            ia, ib, ic, id_ = order[at], order[at + 1], order[at + 2], order[at + 3]
            a, b, c, d = matrix[rows[ia]], matrix[rows[ib]], matrix[rows[ic]], matrix[rows[id_]]
            pa, pb, pc, pd = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            for j in range(width):
                pa += own[j] * a[j]
                pb += own[j] * b[j]
                pc += own[j] * c[j]
                pd += own[j] * d[j]
            products[ia], products[ib], products[ic], products[id_] = pa, pb, pc, pd
            at += 4
        while at < end:
            a, pa = matrix[rows[order[at]]], np.float32(0)
            for j in range(width):
                pa += own[j] * a[j]
            products[order[at]] = pa
            at += 1
