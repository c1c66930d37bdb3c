"""What a table of perplexities is: data only."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """`options` are those of the table's verb; None is the model as it is.

    `seeded`: calibration decides, so seeds matter.
    """

    name: str
    title: str
    options: tuple[str, ...] | None
    seeded: bool = True


@dataclass(frozen=True)
class Printed:
    """A line that was published for `text`, with one number for each of `models`, "-" where there is none.

    It is shown below the row `beside`, or below the whole table if that is None. `note` is what a page says about it;
    `{held}` in it becomes "the settings" or "not the settings".
    """

    title: str
    text: str
    beside: str | None
    models: tuple[str, ...]
    numbers: str
    note: str

    def number(self, model):
        """As printed, "-" if nothing was."""
        return self.numbers.split()[self.models.index(model)] if model in self.models else "-"


@dataclass(frozen=True)
class Table:
    """What one table is.

    `verb` of ptq makes the rows, `protocol` evaluates them. `name`, `models`, `texts`, `calib` and `measured` (names of
    rows; None: all) hold unless the command line says otherwise; `chosen_by` are its words that choose this table.
    `modes`: what --mode offers. `detailed`: effective bits and, for a single model, the ratio to full precision are
    shown too.
    """

    verb: str
    protocol: str
    title: str
    legend: str
    rows: tuple[Row, ...]
    printed: tuple[Printed, ...]
    name: str
    models: tuple[str, ...]
    texts: tuple[str, ...]
    calib: str
    measured: tuple[str, ...] | None = None
    chosen_by: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()
    detailed: bool = False
