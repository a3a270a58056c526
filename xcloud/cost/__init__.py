"""What a run costs: before it starts, while it runs, and what it would cost otherwise. Pure: no Ray, no torch.

`settings` is the job's section `cost`, `bill` the arithmetic of the ledger, `model` predicts a round, `planner` compares
alternatives, `memory` estimates what a device must hold.
"""
