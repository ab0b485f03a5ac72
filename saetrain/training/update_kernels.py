"""One pass over each matrix of weights: Adam, unit rows of the dictionary, and gradients set to zero."""

import numpy as np

from actcache.compiler import compiled


@compiled
def measure_rows(weights, gradient, is_dictionary, parallel, squares, first, last):
    """The square of each row of a gradient; for a dictionary, of its part that is orthogonal to the row of weights.

    Args:
        weights, gradient: [R, D] float32.
        parallel: [R] float32: becomes <gradient, weights> of each row of a dictionary.
        squares: [R] float64.
    """
    width = weights.shape[1]
    for row in range(first, last):
        grad, weight = gradient[row], weights[row]
        along, square = np.float32(0), np.float32(0)
        if is_dictionary:
            for j in range(width):
                along += grad[j] * weight[j]
            for j in range(width):
                rest = grad[j] - along * weight[j]
                square += rest * rest
        else:
            for j in range(width):
                square += grad[j] * grad[j]
        parallel[row], squares[row] = along, square


@compiled
def update_rows(weights, gradient, mean, mean_square, is_dictionary, parallel, numbers, first, last):
    """Adam (Kingma and Ba 2015, with epsilon where torch adds it), then rows of norm 1 for a dictionary.

    Args:
        weights, gradient, mean, mean_square: [R, D] float32. The gradient becomes 0.
        parallel: [R]: the part of the gradient along each row of a dictionary, which is left out.
        numbers: [8] float32: factor of the gradient, learning rate over 1 - beta1^step, 1 / sqrt(1 - beta2^step),
            epsilon, beta1, 1 - beta1, beta2, 1 - beta2.
    """
    width = weights.shape[1]
    scale, rate, correction, epsilon = numbers[0], numbers[1], numbers[2], numbers[3]
    beta1, rest1, beta2, rest2 = numbers[4], numbers[5], numbers[6], numbers[7]
    for row in range(first, last):
        weight, grad, m, v = weights[row], gradient[row], mean[row], mean_square[row]
        along = parallel[row] if is_dictionary else np.float32(0)
        square = np.float32(0)
        for j in range(width):
            g = (grad[j] - along * weight[j]) * scale
            m[j] = beta1 * m[j] + rest1 * g
            v[j] = beta2 * v[j] + rest2 * g * g
            weight[j] -= rate * m[j] / (np.sqrt(v[j]) * correction + epsilon)
            square += weight[j] * weight[j]
            grad[j] = 0
        if is_dictionary:
            factor = np.float32(1) / max(np.sqrt(square), np.float32(1e-8))
            for j in range(width):
                weight[j] *= factor
