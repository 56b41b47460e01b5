"""What MkDocs gets besides the pages: maths, diagrams and the API, all at build time."""
