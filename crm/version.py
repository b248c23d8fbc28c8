"""The version of the project, stored with every run."""

VERSION = "0.1.0"
