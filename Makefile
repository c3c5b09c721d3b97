.PHONY: test exhaustive format check

test: ## the default tests, all gates included
	pytest

exhaustive: ## the full tables
	pytest -m exhaustive

format: ## write what ruff can mend
	ruff check --fix . && ruff format .

check: ## the gates alone
	pytest tests/test_gates.py
