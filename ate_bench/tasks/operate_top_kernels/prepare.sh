cp "$(dirname "${BASH_SOURCE[0]}")/profile.csv" profile.csv
