"""What users of Penstock test with: the contract that every engine keeps."""
