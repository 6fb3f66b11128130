python3 .ate/questions.py ".ate/grade/$ATE_FRAMEWORK.json"
