# Writes data/quickstart.txt: 400 paragraphs of a seeded word salad, the same bytes everywhere.
import os
state, words = 7, "the cat dog sat ran on a mat hill and then slept while rain fell softly".split()
os.makedirs("data", exist_ok=True)
with open("data/quickstart.txt", "w") as out:
    for _ in range(400):
        line = []
        for _ in range(60):
            state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
            line.append(words[(state >> 33) % len(words)])
        out.write(" ".join(line) + ".\n\n")
