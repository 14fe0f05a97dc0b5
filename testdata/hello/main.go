// Hello is the service of the README's walk-through: it greets on port 80, shows its
// bind directory, and answers each line of its stdin.
package main

import (
	"bufio"
	"fmt"
	"net/http"
	"os"
)

func main() {
	http.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintf(w, "%s, this is %s\n", os.Getenv("GREETING"), os.Getenv("HOSTNAME"))
	})
	http.Handle("/data/", http.StripPrefix("/data/", http.FileServer(http.Dir("/data"))))
	go func() { // ends with the program
		for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
			fmt.Printf("%s, %s\n", os.Getenv("GREETING"), lines.Text())
		}
	}()
	if err := http.ListenAndServe(":80", nil); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
