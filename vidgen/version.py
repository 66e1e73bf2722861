"""The version; setup.py runs this file, so it imports nothing."""

VERSION = "0.1.0"
