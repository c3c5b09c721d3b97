"""Trains a task: python train.py --help."""

from visiontasks.cli.train import main

if __name__ == "__main__":
    main()
