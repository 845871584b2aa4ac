"""Test tools for users of Penstock: the contract that every engine fulfils."""
