package main

import (
	"bytes"
	"encoding/json"
	"go/ast"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// readingOrder is the order in which a reviewer reads the files: callers above callees.
var readingOrder = strings.Fields("main server auth listener services console stats images lifecycle spec " +
	"containers engine binds fetch archive tar wire errors")

// upwards are the only references to a file that is read earlier.
var upwards = []string{
	"server main", "lifecycle main", // config
	"binds spec", // the record that it stores
}

// source is the program's own files, with their types.
func source(t *testing.T) (fset *token.FileSet, files map[string]*ast.File, info *types.Info,
	pkg *types.Package) {
	t.Helper()
	list, err := exec.Command("go", "list", "-export", "-deps", "-json=ImportPath,Export,DepOnly,GoFiles",
		".").Output()
	must(t, err)
	fset, files = token.NewFileSet(), map[string]*ast.File{}
	exports, parsed := map[string]string{}, []*ast.File(nil)
	for decoder := json.NewDecoder(bytes.NewReader(list)); decoder.More(); {
		var p struct {
			ImportPath, Export string
			DepOnly            bool
			GoFiles            []string
		}
		must(t, decoder.Decode(&p))
		exports[p.ImportPath] = p.Export
		for _, name := range p.GoFiles {
			if p.DepOnly {
				break
			}
			file, err := parser.ParseFile(fset, name, nil, parser.ParseComments)
			must(t, err)
			files[strings.TrimSuffix(name, ".go")], parsed = file, append(parsed, file)
		}
	}
	lookup := func(path string) (io.ReadCloser, error) { return os.Open(exports[path]) }
	info = &types.Info{Uses: map[*ast.Ident]types.Object{}}
	pkg, err = (&types.Config{Importer: importer.ForCompiler(fset, "gc", lookup)}).Check("main", fset, parsed,
		info)
	must(t, err)
	return fset, files, info, pkg
}

// A reviewer's path goes one way: a file refers to functions, types and variables of those below it.
func TestFilesReferDownwards(t *testing.T) {
	t.Parallel()
	fset, files, info, pkg := source(t)
	for name := range files {
		if !slices.Contains(readingOrder, name) {
			t.Errorf("%s.go has no place in the reading order", name)
		}
	}
	file := func(pos token.Pos) string {
		return strings.TrimSuffix(filepath.Base(fset.Position(pos).Filename), ".go")
	}
	seen := map[string]bool{}
	for ident, object := range info.Uses {
		f, isFunc := object.(*types.Func)
		isMember := object.Parent() == pkg.Scope() || isFunc && f.Signature().Recv() != nil
		if object.Pkg() != pkg || !isMember {
			continue
		}
		from, to := file(ident.Pos()), file(object.Pos())
		if slices.Index(readingOrder, to) < slices.Index(readingOrder, from) {
			if seen[from+" "+to] = true; !slices.Contains(upwards, from+" "+to) {
				t.Errorf("%s.go refers upwards: to %s of %s.go", from, object.Name(), to)
			}
		}
	}
	for _, arrow := range upwards {
		if !seen[arrow] {
			t.Errorf("%q is not needed any more", arrow)
		}
	}
}

// A line of a test has to fit on the screen too.
func TestLinesOfTestsAreShort(t *testing.T) {
	t.Parallel()
	names, err := filepath.Glob("*_test.go")
	must(t, err)
	for _, name := range names {
		text, err := os.ReadFile(name)
		must(t, err)
		for i, line := range strings.Split(string(text), "\n") {
			if len(line) > 110 {
				t.Errorf("%s:%d has %d columns", name, i+1, len(line))
			}
		}
	}
}

// A reader has to hold a function, and a file, in mind.
func TestFilesAndFunctionsAreShort(t *testing.T) {
	t.Parallel()
	fset, files, _, _ := source(t)
	comment := regexp.MustCompile(`^\s*(//.*)?$`)
	for name, file := range files {
		text, err := os.ReadFile(name + ".go")
		must(t, err)
		code := 0
		for i, line := range strings.Split(string(text), "\n") {
			if len(line) > 110 {
				t.Errorf("%s.go:%d has %d columns", name, i+1, len(line))
			}
			if !comment.MatchString(line) {
				code++
			}
		}
		if code > 400 {
			t.Errorf("%s.go has %d lines of code", name, code)
		}
		for _, decl := range file.Decls {
			if lines := fset.Position(decl.End()).Line - fset.Position(decl.Pos()).Line + 1; lines > 50 {
				if f, ok := decl.(*ast.FuncDecl); ok {
					t.Errorf("%s.go: %s has %d lines", name, f.Name.Name, lines)
				}
			}
		}
	}
}
