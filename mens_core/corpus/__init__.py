"""Source trees and files become rows; rows are read back and checked."""
