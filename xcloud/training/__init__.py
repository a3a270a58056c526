"""Adapters to DeepSpeed and torch: models, engines and the worker that drives one rank."""
