"""The page of a table: records in, Markdown out."""

import statistics

from _tables import describe_machine, markdown

BITS = ("weights_effective", "activations_effective", "kv_bits_effective")
FULL_BITS = 16


def page(table, records, shared, made_by):
    """One table a text: a line for each row, and below it what was printed for the same row, if anything."""
    models = list(dict.fromkeys(record["model"] for record in records))
    texts = list(dict.fromkeys(name for record in records for name in record["texts"]))
    machines = sorted({describe(record["made_with"]) for record in records})
    parts = [f"# {table.title}"]
    for text in texts:
        parts += [f"## {text}", aligned(lines(table, records, text, models))]
    if table.detailed and len(models) > 1:
        heading = "## Effective bits: weights / activations / keys and values"
        parts += [heading, aligned(bit_lines(table, records, models))]
    parts += [legend(table, shared), *notes(table, shared, models)]
    parts += [f"n/a: {failure}." for failure in failures(records)]
    parts.append(f"Made by `{made_by}` on {'; '.join(machines)}.")
    return "\n\n".join(parts) + "\n"


def aligned(cells):
    """Markdown, every column but the first aligned to the right."""
    return markdown(cells, right=range(1, len(cells[0])))


def legend(table, shared):
    """What the numbers of a page are."""
    windows = f"the first {shared['windows']} windows" if shared["windows"] else "all windows of the protocol"
    mode = f", {shared['mode']} windows" if "mode" in shared else ""
    return (
        f"Perplexity, protocol {shared['protocol']}, {windows}, {shared['seqlen']} tokens each. Calibrated on"
        f" {shared['nsamples']} x {shared['seqlen']} tokens of {shared['calib']}{mode}. ± is the standard deviation"
        f" over as many seeds as the brackets say; a number without brackets is one run. {table.legend}"
    )


def notes(table, shared, models):
    """What is to be said of the printed lines that concern these models."""
    held = "the settings" if comparable(table, shared) else "not the settings"
    found = [line.note for line in table.printed if not set(models).isdisjoint(line.models)]
    return [note.format(held=held) for note in dict.fromkeys(found)]


def comparable(table, shared):
    """Whether what was printed was measured with these settings: those of a call without options."""
    usual = {"protocol": table.protocol, "calib": table.calib, "nsamples": 128, "seqlen": 2048, "windows": None}
    return {**shared, "mode": shared.get("mode", "random")} == {**usual, "mode": "random"}


def failures(records):
    """One line for each number that could not be had."""
    return [
        f"{record['row']} of {record['model']}, seed {record['seed']}, {text}: {result['failed']}"
        for record in records
        for text, result in record["texts"].items()
        if "failed" in result
    ]


def describe(facts):
    """The machine, in one line."""
    return (f"{facts['device']}; " if "device" in facts else "") + describe_machine(facts)


def lines(table, records, text, models):
    """The cells of one text, heading first; of a single model, a detailed table shows the ratio and the bits too."""
    single = table.detailed and len(models) == 1
    found = [["row", *models, *(("ratio", "weight bits", "activation bits", "KV bits") if single else ())]]
    for row in table.rows:
        ours = [cell(records, text, model, row.name) for model in models]
        if any(one != "-" for one in ours):
            more = [ratio(records, text, models[0], row.name), *bits(records, models[0], row.name)] if single else []
            found.append([row.title, *ours, *more])
        found += printed_lines(table, text, row.name, models)
    found += printed_lines(table, text, None, models)
    return [line + ["-"] * (len(found[0]) - len(line)) for line in found]


def printed_lines(table, text, row, models):
    """What was printed beside a row, for these models."""
    ours = [line for line in table.printed if line.text == text and line.beside == row]
    cells = [[line.title, *(line.number(model) for model in models)] for line in ours]
    return [line for line in cells if any(one != "-" for one in line[1:])]


def bit_lines(table, records, models):
    """The effective bits of several models, heading first."""
    found = [["row", *models]]
    for row in table.rows:
        each = [bits(records, model, row.name) for model in models]
        if any(one[0] != "-" for one in each):
            found.append([row.title, *("-" if one[0] == "-" else " / ".join(one) for one in each)])
    return found


def perplexities(records, text, model, row):
    """(what the seeds gave, but for those that failed; whether any seed was tried)."""
    results = [r["texts"][text] for r in records if r["model"] == model and r["row"] == row and text in r["texts"]]
    return [result["perplexity"] for result in results if "perplexity" in result], bool(results)


def cell(records, text, model, row):
    """Mean and standard deviation over the seeds that were measured, as text."""
    values, tried = perplexities(records, text, model, row)
    if not values:
        return "n/a" if tried else "-"
    spread = f" ± {statistics.stdev(values):.2f} ({len(values)})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def ratio(records, text, model, row):
    """Mean perplexity over that of full precision, as text."""
    values, full = (perplexities(records, text, model, name)[0] for name in (row, "full"))
    return f"{statistics.mean(values) / statistics.mean(full):.3f}" if values and full else "-"


def bits(records, model, row):
    """Effective bits of weights, activations, keys and values, means over the seeds, as text."""
    found = [r["bits"] for r in records if r["model"] == model and r["row"] == row and "bits" in r]
    if not found:
        return ["-"] * len(BITS)
    # null in a report: nothing was quantized there
    columns = [[FULL_BITS if one[name] is None else one[name] for one in found] for name in BITS]
    return [f"{statistics.mean(column):.2f}" for column in columns]
