package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// What the documents name is there: tests, functions, lines of code, and each other. They are short enough to be read.
func TestDocumentsNameWhatIsThere(t *testing.T) {
	t.Parallel()
	read := func(pattern string) string {
		var all strings.Builder
		names, _ := filepath.Glob(pattern)
		for _, name := range names {
			text, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			all.Write(text)
		}
		return all.String()
	}
	code := read("*.go")
	documents := []string{"README.md"}
	for _, pattern := range []string{"docs/*.md", "packaging/*.md"} {
		names, _ := filepath.Glob(pattern)
		documents = append(documents, names...)
	}
	for _, name := range documents {
		text := read(name)
		for _, found := range regexp.MustCompile("`((?:Test|Fuzz|Benchmark)[A-Za-z0-9]+)`").FindAllStringSubmatch(text, -1) {
			if !strings.Contains(code, "\nfunc "+found[1]+"(") {
				t.Errorf("%s: there is no %s", name, found[1])
			}
		}
		for _, found := range regexp.MustCompile("`([A-Za-z0-9]+)\\(\\)`").FindAllStringSubmatch(text, -1) {
			if !regexp.MustCompile(`\nfunc (\([^)]*\) )?` + found[1] + `\(`).MatchString(code) {
				t.Errorf("%s: there is no function %s", name, found[1])
			}
		}
		for _, found := range regexp.MustCompile("`([a-z]+\\.go)`: `([^`]+)`").FindAllStringSubmatch(text, -1) {
			if !strings.Contains(read(found[1]), strings.ReplaceAll(found[2], `\|`, "|")) {
				t.Errorf("%s: %s has no %q", name, found[1], found[2])
			}
		}
		for _, found := range regexp.MustCompile(`\]\(([^):]*)\)`).FindAllStringSubmatch(text, -1) { // none of the web
			path, anchor, _ := strings.Cut(found[1], "#")
			file := name
			if path != "" {
				file = filepath.Join(filepath.Dir(name), path)
			}
			if _, err := os.Stat(file); err != nil {
				t.Errorf("%s: %v", name, err)
			} else if anchor != "" && !anchors(read(file))[anchor] {
				t.Errorf("%s: %s has no heading #%s", name, file, anchor)
			}
		}
		code := false
		for line := range strings.Lines(text) {
			code = code != strings.HasPrefix(line, "```")
			if length := len([]rune(strings.TrimSpace(line))); length > 120 && !code && !strings.HasPrefix(line, "|") {
				t.Errorf("%s: a line of %d characters: %.60s…", name, length, line)
			}
		}
	}
	readme, guide := read("README.md"), read("docs/AUDIT.md")
	if len(readme) > 12<<10 {
		t.Errorf("the README has %d bytes, 12 KiB at most are read", len(readme))
	}
	for _, pattern := range []string{"docs/*.*", "packaging/*.md"} {
		names, _ := filepath.Glob(pattern)
		for _, name := range names {
			if !strings.Contains(readme, "]("+name+")") {
				t.Errorf("the README does not link %s", name)
			}
		}
	}
	files, _ := filepath.Glob("*.go")
	for _, name := range files {
		if !strings.HasSuffix(name, "_test.go") && !strings.Contains(guide, "| `"+name+"` |") {
			t.Errorf("the guide does not say what to be certain of in %s", name)
		}
	}
}

// anchors returns the names by which a Markdown file's headings can be linked to.
func anchors(text string) map[string]bool {
	all := map[string]bool{}
	for _, heading := range regexp.MustCompile(`(?m)^#+ (.*)$`).FindAllStringSubmatch(text, -1) {
		kept := regexp.MustCompile(`[^\p{L}\p{N} _-]`).ReplaceAllString(strings.ToLower(heading[1]), "")
		all[strings.ReplaceAll(kept, " ", "-")] = true
	}
	return all
}
