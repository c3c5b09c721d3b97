"""Makes pictures with a trained generator: python generate.py --help."""

from visiontasks.cli.generate import main

if __name__ == "__main__":
    main()
