package main

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// The audit guide and the README name lines of code and tests: all of them are there.
func TestAuditGuideNamesWhatIsThere(t *testing.T) {
	t.Parallel()
	read := func(name string) string {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	tests, _ := filepath.Glob("*_test.go")
	var functions strings.Builder
	for _, name := range tests {
		functions.WriteString(read(name))
	}
	guide := read("docs/AUDIT.md")
	for _, found := range regexp.MustCompile("`((?:Test|Fuzz)[A-Za-z0-9]+)`").FindAllStringSubmatch(guide+read("README.md"), -1) {
		if !strings.Contains(functions.String(), "\nfunc "+found[1]+"(") {
			t.Errorf("there is no %s", found[1])
		}
	}
	lines := regexp.MustCompile("`([a-z]+\\.go)`: `([^`]+)`").FindAllStringSubmatch(guide, -1)
	if len(lines) < 20 {
		t.Errorf("the guide names %d lines of code", len(lines))
	}
	for _, found := range lines {
		if !strings.Contains(read(found[1]), strings.ReplaceAll(found[2], `\|`, "|")) {
			t.Errorf("%s has no %q", found[1], found[2])
		}
	}
	files, _ := filepath.Glob("*.go")
	for _, name := range slices.DeleteFunc(files, func(name string) bool { return strings.HasSuffix(name, "_test.go") }) {
		if !strings.Contains(guide, "| `"+name+"` |") {
			t.Errorf("the guide does not say when to read %s", name)
		}
	}
}
