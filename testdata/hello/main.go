// Hello is the service of the README's walk-through: it greets on port 80 and shows
// its bind directory.
package main

import (
	"fmt"
	"net/http"
	"os"
)

func main() {
	http.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintf(w, "%s, this is %s\n", os.Getenv("GREETING"), os.Getenv("HOSTNAME"))
	})
	http.Handle("/data/", http.StripPrefix("/data/", http.FileServer(http.Dir("/data"))))
	if err := http.ListenAndServe(":80", nil); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
