//go:build ignore

// Sbom writes a CycloneDX list of what a program was built from:
//
//	go run packaging/sbom.go PROGRAM VERSION >FILE
//
// The modules are those in the program, their sums are from go.sum, their licences from packaging/debian/copyright. One
// without either is an error. There is no serial number and no time: the same program gives the same list.
package main

import (
	"crypto/sha256"
	"debug/buildinfo"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"log"
	"net/url"
	"os"
	"strings"
)

type component struct {
	Ref      string    `json:"bom-ref"`
	Type     string    `json:"type"`
	Name     string    `json:"name"`
	Version  string    `json:"version"`
	Purl     string    `json:"purl"`
	Hashes   []hash    `json:"hashes,omitempty"`
	Licenses []license `json:"licenses"`
}

type hash struct {
	Alg     string `json:"alg"`
	Content string `json:"content"`
}

type license struct {
	License map[string]string `json:"license"`
}

func main() {
	log.SetFlags(0)
	if len(os.Args) != 3 {
		log.Fatal("usage: go run packaging/sbom.go PROGRAM VERSION")
	}
	program, err := buildinfo.ReadFile(os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	copyright, sums := read("packaging/debian/copyright"), read("go.sum")
	list := []component{describe("library", "std", program.GoVersion, "BSD-3-Clause")}
	for _, module := range program.Deps {
		c := describe("library", module.Path, module.Version, licenseOf(copyright, "vendor/"+module.Path+"/"))
		// The SHA-256 of a list of the module's files and theirs: golang.org/x/mod/sumdb/dirhash.
		_, sum, _ := strings.Cut("\n"+sums, "\n"+module.Path+" "+module.Version+" h1:")
		sum, _, _ = strings.Cut(sum, "\n")
		bytes, err := base64.StdEncoding.DecodeString(sum)
		if len(bytes) == 0 || err != nil {
			log.Fatalf("go.sum has no sum of %s %s", module.Path, module.Version)
		}
		c.Hashes = []hash{{"SHA-256", fmt.Sprintf("%x", bytes)}}
		list = append(list, c)
	}
	root := describe("application", program.Main.Path, os.Args[2], licenseOf(copyright, "main.go"))
	root.Hashes = []hash{{"SHA-256", fmt.Sprintf("%x", sha256.Sum256([]byte(read(os.Args[1]))))}}
	var all []string
	for _, c := range list {
		all = append(all, c.Ref)
	}
	out := json.NewEncoder(os.Stdout)
	out.SetIndent("", "  ")
	err = out.Encode(map[string]any{
		"bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1,
		"metadata":     map[string]any{"component": root},
		"components":   list,
		"dependencies": []any{map[string]any{"ref": root.Ref, "dependsOn": all}},
	})
	if err != nil {
		log.Fatal(err)
	}
}

func describe(kind, name, version, licenseName string) component {
	purl := "pkg:golang/" + name + "@" + url.QueryEscape(version)
	key := "id"
	switch licenseName { // Debian's names are SPDX's, but for these
	case "Expat":
		licenseName = "MIT"
	case "all-rights-reserved":
		key = "name"
		if kind == "library" {
			log.Fatalf("packaging/debian/copyright does not name %s", name)
		}
	}
	return component{purl, kind, name, version, purl, nil, []license{{map[string]string{key: licenseName}}}}
}

// licenseOf returns what a copyright file of Debian says of a path in the source archive: the last
// "Files:" with a pattern that fits. All patterns there end in their only *.
func licenseOf(copyright, path string) (found string) {
	for paragraph := range strings.SplitSeq(copyright, "\n\n") {
		files, rest, _ := strings.Cut(paragraph, "\nCopyright:")
		files, ok := strings.CutPrefix(files, "Files:")
		for _, pattern := range strings.Fields(files) {
			if ok && strings.HasPrefix(path, strings.TrimSuffix(pattern, "*")) {
				_, found, _ = strings.Cut(rest, "\nLicense: ")
				found, _, _ = strings.Cut(found, "\n")
			}
		}
	}
	return found
}

func read(name string) string {
	text, err := os.ReadFile(name)
	if err != nil {
		log.Fatal(err)
	}
	return string(text)
}
