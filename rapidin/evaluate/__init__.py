"""`rapidin eval`: are the answers right? Methods against ground truth that was planted, labelled or
retrained.

`figures` holds the measures, `methods` what is compared; one module an evaluation: `backdoor`, `classes`,
`mislabel`, `lds`, `facts`, `fidelity`, `select`; `tasks` makes data whose truth is known. Each evaluation is
a function that returns a `Result`, a table that knows its JSON. docs/evaluation.md says what each measures
and how to read it.
"""
