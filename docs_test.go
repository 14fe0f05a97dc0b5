package main

import (
	"encoding/xml"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// What the documents name is there: tests, functions, lines of code, and each other. They are short enough to
// be read.
func TestDocumentsNameWhatIsThere(t *testing.T) {
	t.Parallel()
	read := func(pattern string) string {
		var all strings.Builder
		names, _ := filepath.Glob(pattern)
		for _, name := range names {
			text, err := os.ReadFile(name)
			must(t, err)
			all.Write(text)
		}
		return all.String()
	}
	code, program := read("*.go"), ""
	var files []string // of the program
	names, _ := filepath.Glob("*.go")
	for _, name := range names {
		if !strings.HasSuffix(name, "_test.go") {
			files, program = append(files, name), program+read(name)
		}
	}
	documents := []string{"README.md", "CONTRIBUTING.md"}
	for _, pattern := range []string{"docs/*.md", "packaging/*.md"} {
		names, _ := filepath.Glob(pattern)
		documents = append(documents, names...)
	}
	for _, name := range documents {
		text := read(name)
		tests := regexp.MustCompile("`((?:Test|Fuzz|Benchmark)[A-Za-z0-9]+)`")
		for _, found := range tests.FindAllStringSubmatch(text, -1) {
			if !strings.Contains(code, "\nfunc "+found[1]+"(") {
				t.Errorf("%s: there is no %s", name, found[1])
			}
		}
		for _, found := range regexp.MustCompile("`([A-Za-z0-9]+)\\(\\)`").FindAllStringSubmatch(text, -1) {
			if !regexp.MustCompile(`\nfunc (\([^)]*\) )?` + found[1] + `\(`).MatchString(program) {
				t.Errorf("%s: there is no function %s", name, found[1])
			}
		}
		for _, found := range regexp.MustCompile("`([a-z]+\\.go)`: `([^`]+)`").FindAllStringSubmatch(text, -1) {
			if !strings.Contains(read(found[1]), strings.ReplaceAll(found[2], `\|`, "|")) {
				t.Errorf("%s: %s has no %q", name, found[1], found[2])
			}
		}
		links := regexp.MustCompile(`\]\(([^):]*)\)`) // but those to the web
		for _, found := range links.FindAllStringSubmatch(text, -1) {
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
	rooms := read("docs/rooms.svg")
	for _, name := range files {
		if !strings.Contains(guide, "| `"+name+"` |") {
			t.Errorf("the guide does not say what to be certain of in %s", name)
		}
		if !strings.Contains(rooms, ">"+name+"<") {
			t.Errorf("the picture of the rooms has no %s", name)
		}
	}
	for _, name := range []string{"docs/rooms.svg", "docs/lifecycle.svg"} {
		if err := xml.Unmarshal([]byte(read(name)), new(struct{})); err != nil {
			t.Errorf("%s: %v", name, err)
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

// messagesOfOthers are parts of the troubleshooting table that the daemon does not write: systemd, the
// kernel, the standard library and the engine do.
const messagesOfOthers = `Assertion failed on job for duxcore-daemon.service, read-only file system,
listen tcp, address already in use, permission denied, client version, is too old, is too new, port is
already allocated, cannot start a paused container, try unpause instead, certificate signed by
unknown authority, accept, too many open files; retrying, count=, operation not
permitted, no space left on device, The container name, is already in use, bind source
path does not exist`

// programTexts returns the strings in the program's source, those that are joined with + as one.
func programTexts(t *testing.T) (texts []string) {
	t.Helper()
	names, _ := filepath.Glob("*.go")
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, 0)
		must(t, err)
		ast.Inspect(file, func(node ast.Node) bool {
			expr, ok := node.(ast.Expr)
			if ok {
				texts = append(texts, literalText(expr))
			}
			return true
		})
	}
	return texts
}

// literalText returns the value of a string literal, or of several that are joined with +.
func literalText(expr ast.Expr) string {
	switch e := expr.(type) {
	case *ast.BasicLit:
		text, _ := strconv.Unquote(e.Value)
		return text
	case *ast.BinaryExpr:
		return literalText(e.X) + literalText(e.Y)
	}
	return ""
}

// The words of each message that the troubleshooting table quotes are in the program: what stands between
// two values, that is numbers, names in quotation marks, and what is left out.
func TestTroubleshootingQuotesMessagesOfTheProgram(t *testing.T) {
	t.Parallel()
	guide, err := os.ReadFile("docs/OPERATE.md")
	must(t, err)
	_, table, _ := strings.Cut(string(guide), "\n## Troubleshooting by error message\n")
	table, _, _ = strings.Cut(table, "\n## ")
	texts := append(programTexts(t), strings.ReplaceAll(messagesOfOthers, "\n", " "))
	value, checked := regexp.MustCompile(`…|: |, |"|[0-9]+|\.services`), 0
	for line := range strings.Lines(table) {
		cell, _, _ := strings.Cut(strings.TrimPrefix(strings.ReplaceAll(line, `\|`, "¦"), "|"), "|")
		for _, quoted := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(cell, -1) {
			for _, words := range value.Split(quoted[1], -1) {
				checked++
				words = strings.TrimSpace(words)
				if !slices.ContainsFunc(texts, func(text string) bool { return strings.Contains(text, words) }) {
					t.Errorf("the program has no message with %q", words)
				}
			}
		}
	}
	if checked < 80 {
		t.Errorf("%d parts of messages were found in the table", checked)
	}
}
