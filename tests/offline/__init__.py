"""Tests of what works on folders; a package, so that its conftest stands beside that of all tests."""
