"""What MkDocs gets besides the pages: maths at build time."""
