"""`rapidin eval`: attribution methods compared with ground truth that was planted, labelled or retrained.

One module per evaluation, named as its command: `backdoor`, `classes`, `mislabel`, `fidelity` run on a cache
(`subject`); `lds` (with `ground_truth`), `facts`, `select` on a model that they tune (`tuned`, `variants`).
Each has a function `evaluate` that returns a `result.Result`, with a table and JSON. `metrics` holds the
metrics, `methods` the methods compared, `tasks` makes data whose truth is known, `training` is the trainer,
`saving` what it writes, `folders` and `log` what runs that resume have in common. docs/guide/evaluation.md
says what each evaluation measures and how to read it.

`confirm` is `rapidin confirm`: `left_out` has the rows that it leaves out, `retraining` trains without them
by the recipe in `saved_recipe`, and `asked` is what the models say.
"""
