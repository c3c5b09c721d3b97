"""Measures a trained task: python evaluate.py --help."""

from visiontasks.cli.evaluate import main

if __name__ == "__main__":
    main()
