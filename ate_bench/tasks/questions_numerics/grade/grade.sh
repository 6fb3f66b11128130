python3 .ate/questions.py .ate/grade/questions.json
