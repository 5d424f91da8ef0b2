"""A run from its first check to the last file that it leaves. Imports every other room; only scripts import it."""
