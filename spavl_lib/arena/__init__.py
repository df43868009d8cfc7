"""The arena: methods of alignment against attacks, measured on the embedded world."""
