"""The one error of the solver that is about numbers, not about arguments."""


class SolveError(ArithmeticError):
    """H holds NaN or Inf, holds nothing, or stays indefinite at every damping tried. The message is one line."""
